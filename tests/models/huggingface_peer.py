"""What transformers computes of Hugging Face folders. Run by an interpreter that has it, with torch; knows no tfvllm.

    python huggingface_peer.py ANSWERS.npz FOLDER…

Beside each folder lies FOLDER.json: {"auto": class, "texts": [...] or null, "inputs": {name: rows}}.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np


def answer(folder: Path) -> dict[str, np.ndarray]:
    import torch
    import transformers

    asked = json.loads(folder.with_name(folder.name + ".json").read_text(encoding="utf-8"))
    kind = getattr(transformers, asked["auto"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, report = kind.from_pretrained(
            str(folder), attn_implementation="eager", output_loading_info=True, torch_dtype=torch.float32
        )
    missing = [name for name in report["missing_keys"] if not name.startswith("pooler.")]
    wrong = [*missing, *report["unexpected_keys"], *report["mismatched_keys"]]
    assert not wrong, f"{folder.name}: {wrong}"
    with torch.no_grad():
        found = model.eval()(**{name: torch.tensor(rows) for name, rows in asked["inputs"].items()})
    result = {"outputs": found[0].float().numpy()}
    if asked["texts"] is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
        for index, text in enumerate(asked["texts"]):
            result[f"bare/{index}"] = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], "int32")
            result[f"whole/{index}"] = np.asarray(tokenizer(text)["input_ids"], "int32")
        result["size"] = np.asarray(len(tokenizer))
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = [getattr(tokenizer, name) for name in names]
        result["ids"] = np.asarray([-1 if index is None else index for index in ids])
    return result


if __name__ == "__main__":
    answers, *folders = map(Path, sys.argv[1:])
    np.savez(answers, **{f"{f.name}/{k}": v for f in folders for k, v in answer(f).items()})
