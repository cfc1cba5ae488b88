"""Which versions of which models are loaded; new versions come up before old ones go down, and nobody is dropped."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tfvllm.errors import InputError
from tfvllm.savedmodel import versions
from tfvllm.serving.batching import Batcher
from tfvllm.serving.servable import Signature
from tfvllm.serving.status import ServingError, invalid, not_found

logger = logging.getLogger("tfvllm.serving")

_RETRY_S = 60.0  # a version that failed to load is tried again after this, or when its folder changes


@dataclass(frozen=True)
class ModelConfig:
    """What to serve under a name.

    Attributes:
        name: the model's name in requests.
        base_path: a folder of version folders, or one SavedModel.
        latest: serve this many of the highest versions; None with `specific` None serves all.
        specific: serve exactly these versions.
        labels: version labels, e.g. {"stable": 1, "canary": 2}.
    """

    name: str
    base_path: Path
    latest: int | None = 1
    specific: tuple[int, ...] | None = None
    labels: dict[str, int] = field(default_factory=dict)

    def find(self) -> dict[int, Path]:
        """The versions that should be loaded now."""
        base = Path(self.base_path)
        if (base / "saved_model.pb").is_file():
            return {int(base.name) if base.name.isdigit() and len(base.name) <= 18 else 1: base}
        found = versions.find(base)
        if self.specific is not None:
            return {number: found[number] for number in self.specific if number in found}
        if self.latest is not None:
            return {number: found[number] for number in sorted(found)[-self.latest :]}
        return found


class Version:
    """One version of a model: its state as TF Serving names them, its signatures, its queues, who is using it."""

    def __init__(self, model: str, number: int, directory: Path, key: str):
        self.model = model
        self.number = number
        self.directory = directory
        self.key = key
        self.state = "START"
        self.code = "OK"
        self.message = ""
        self.signatures: dict[str, Signature] = {}
        self.batchers: dict[str, Batcher] = {}
        self.stamp = _stamp(directory)
        self.failed_at = 0.0
        self._users = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def use(self) -> Iterator["Version"]:
        """Keeps the version loaded while a request uses it."""
        self._users += 1
        self._idle.clear()
        try:
            yield self
        finally:
            self._users -= 1
            if not self._users:
                self._idle.set()

    async def idle(self) -> None:
        """Waits until no request uses it."""
        await self._idle.wait()

    def fail(self, code: str, message: str) -> None:
        """Marks a failed load."""
        self.state, self.code, self.message = "END", code, message
        self.failed_at = time.monotonic()


class Manager:
    """The models of a server.

    `executor` loads and runs; `make_batcher(version, signature)` makes the queue of a signature.
    """

    def __init__(
        self,
        models: Sequence[ModelConfig],
        executor,
        make_batcher: Callable[[Version, Signature], Batcher],
        *,
        observe_load: Callable[[str, int, str, float], None] | None = None,
    ):
        self._executor = executor
        self._make_batcher = make_batcher
        self._observe_load = observe_load or (lambda model, version, status, seconds: None)
        self._models: dict[str, ModelConfig] = {}
        self._versions: dict[str, dict[int, Version]] = {}
        self._numbers = itertools.count()
        self._passes = asyncio.Lock()
        self._retiring: set[asyncio.Task] = set()
        self.closing = False
        self._set_models(models)

    # --- configuration ---

    def _set_models(self, models: Sequence[ModelConfig]) -> None:
        names = [model.name for model in models]
        for name in names:
            if not name:
                raise InputError("a model's name is empty; expected a name for requests to ask for.")
            if names.count(name) > 1:
                raise InputError(f"two models are named {name!r}; expected each name once.")
        self._models = {model.name: model for model in models}
        for name in names:
            self._versions.setdefault(name, {})

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The configured models by name."""
        return dict(self._models)

    async def reconfigure(self, models: Sequence[ModelConfig]) -> None:
        """Serves exactly `models` from now on; returns when that is so. Raises ServingError when one cannot load."""
        for model in models:
            for label, number in model.labels.items():
                loaded = self._versions.get(model.name, {}).get(number)
                if number not in model.find() and (loaded is None or loaded.state != "AVAILABLE"):
                    raise ServingError(
                        "FAILED_PRECONDITION",
                        f"Request to assign label {label!r} to version {number} of model {model.name}, "
                        "which is not currently available for inference",
                    )
        try:
            self._set_models(models)
        except InputError as error:
            raise invalid(str(error)) from None
        await self.refresh(retry=True)
        for model in models:
            if not self._available(model.name):
                failed = [version for version in self._versions.get(model.name, {}).values() if version.message]
                reason = failed[-1].message if failed else f"no versions of servable {model.name} found under base path"
                raise ServingError("INTERNAL", f"model {model.name} did not load: {reason}")

    # --- loading and unloading ---

    async def refresh(self, *, retry: bool = False) -> None:
        """Looks at the folders once: loads what is new, then lets go of what is no longer wanted."""
        async with self._passes:
            for name in list(self._versions):
                model = self._models.get(name)
                wanted = model.find() if model is not None else {}
                if model is not None and not wanted and self._available(name):
                    # Like TF Serving, which keeps the last version when its folder is gone, lest it serve nothing.
                    logger.warning("no version of %s is left under %s; keeping the loaded one", name, model.base_path)
                    continue
                # A folder replaced under its number (a new stamp) is a new version all the same.
                for number, directory in sorted(wanted.items()):
                    await self._bring_up(name, number, directory, retry)
                loaded = self._available(name)
                if model is not None and wanted and not any(number in wanted for number in loaded):
                    continue  # nothing of the new is up: keep the old
                for number in sorted(loaded):
                    if number not in wanted:
                        self._retire(self._versions[name][number])
                if model is None and not loaded:
                    self._versions.pop(name, None)

    async def _bring_up(self, name: str, number: int, directory: Path, retry: bool) -> None:
        known = self._versions[name].get(number)
        if known is not None:
            same = known.stamp == _stamp(directory)
            if known.state in ("LOADING", "AVAILABLE") and same:
                return
            waited = time.monotonic() - known.failed_at >= _RETRY_S
            if known.state == "END" and known.message and same and not (retry or waited):
                return
        version = Version(name, number, directory, f"{name}/{number}#{next(self._numbers)}")
        keep = known if known is not None and known.state == "AVAILABLE" else None
        if keep is None:
            self._versions[name][number] = version
        version.state = "LOADING"
        start = time.monotonic()
        try:
            version.signatures = await self._executor.load(version.key, directory)
        except Exception as error:
            message = getattr(error, "message", str(error))
            version.fail(getattr(error, "code", "INTERNAL"), message)
            if keep is not None:
                keep.stamp = version.stamp
            self._observe_load(name, number, "fail", time.monotonic() - start)
            logger.error("version %d of %s does not load: %s", number, name, message)
            return
        for signature in version.signatures.values():
            version.batchers[signature.name] = self._make_batcher(version, signature)
        version.state = "AVAILABLE"
        self._versions[name][number] = version
        seconds = time.monotonic() - start
        self._observe_load(name, number, "success", seconds)
        logger.info("serving version %d of %s from %s (loaded in %.1f s)", number, name, directory, seconds)
        if keep is not None:
            self._retire(keep)

    def _retire(self, version: Version) -> None:
        version.state = "UNLOADING"
        task = asyncio.ensure_future(self._let_go(version))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _let_go(self, version: Version) -> None:
        await version.idle()
        await self._executor.unload(version.key)
        version.state = "END"
        version.batchers.clear()
        logger.info("version %d of %s is unloaded", version.number, version.model)

    async def watch(self, seconds: float) -> None:
        """Looks at the folders every `seconds`, for ever."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.refresh()
            except OSError as error:
                logger.error("cannot look for new versions: %s", error)

    async def follow(self, read: Callable[[], Sequence[ModelConfig]], seconds: float) -> None:
        """Serves what `read` says, asked every `seconds`, for ever. What cannot be read or loaded is logged, once."""
        told = ""
        while True:
            await asyncio.sleep(seconds)
            try:
                models = list(await asyncio.to_thread(read))
                if models != list(self._models.values()):
                    await self.reconfigure(models)
                    logger.info("the model config has changed; serving %s", ", ".join(self._models))
                told = ""
            except (InputError, ServingError, OSError) as error:
                if str(error) != told:
                    logger.error("the changed model config is not served: %s", error)
                told = str(error)

    async def close(self) -> None:
        """Waits for the requests under way, then unloads everything."""
        self.closing = True
        for name in list(self._versions):
            for number in sorted(self._available(name)):
                self._retire(self._versions[name][number])
        if self._retiring:
            await asyncio.gather(*list(self._retiring), return_exceptions=True)

    # --- asking ---

    def _available(self, name: str) -> dict[int, Version]:
        found = self._versions.get(name, {})
        return {number: version for number, version in found.items() if version.state == "AVAILABLE"}

    def _meant(self, name: str, number: int | None) -> int | None:
        # OpenVINO's clients ask for version 0 where they mean the newest.
        return None if number == 0 and 0 not in self._versions.get(name, {}) else number

    def find(self, name: str, number: int | None = None, label: str | None = None) -> Version:
        """The version a request means. Raises ServingError in TF Serving's words when there is none."""
        if not name:
            raise invalid("Missing ModelSpec")
        available = self._available(name)
        if label:
            labels = self._models[name].labels if name in self._models else {}
            if label not in labels:
                raise invalid(f"Unrecognized servable version label: {label}")
            number = labels[label]
        number = self._meant(name, number)
        if number is not None:
            if number in available:
                return available[number]
            raise not_found(f"Servable not found for request: Specific({name}, {number})")
        if available:
            return available[max(available)]
        raise not_found(f"Servable not found for request: Latest({name})")

    def status(self, name: str, number: int | None = None, label: str | None = None) -> list[Version]:
        """The versions of a model, highest first. Raises ServingError when there are none."""
        if not name:
            raise invalid("Missing model name in request.")
        if label:
            number = self.find(name, label=label).number
        number = self._meant(name, number)
        found = self._versions.get(name, {})
        chosen = [version for version in found.values() if number is None or version.number == number]
        if not chosen:
            which = f"version {number} of model {name}" if number is not None else f"any versions of model {name}"
            raise not_found(f"Could not find {which}")
        return sorted(chosen, key=lambda version: -version.number)

    @property
    def ready(self) -> bool:
        """Whether each configured model has a version that answers."""
        return not self.closing and all(self._available(name) for name in self._models)


def _stamp(directory: Path) -> tuple | None:
    try:
        stat = (Path(directory) / "saved_model.pb").stat()
    except OSError:
        return None
    return (stat.st_ino, stat.st_mtime_ns, stat.st_size)
