"""A graph as a Mermaid diagram, blocks of a model as groups."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

from tfvllm.graph.ir import Graph, Node
from tfvllm.graph.rewriter import short

_HIDDEN = frozenset({"Const", "Placeholder", "ReadVariableOp", "NoOp"})


_SHAPING = frozenset({"Shape", "Pack", "StridedSlice", "Prod", "ConcatV2", "GatherV2"})


_MAX_GROUPS = 40


def diagram(graph: Graph) -> str:
    """The graph as a Mermaid flowchart: one box for each layer, with the ops it runs; constants and weights hidden."""
    live = [n for n in graph.live() if n.op not in _HIDDEN]
    key = _grouping(live)
    groups: dict[str, list[Node]] = defaultdict(list)
    for node in live:
        groups[key(node)].append(node)
    ids = {name: f"g{i}" for i, name in enumerate(groups)}
    lines = ["flowchart TD"]
    for i, name in enumerate(graph.inputs):
        lines.append(f'  in{i}(["{_escape(name)}"])')
    for name, nodes in groups.items():
        lines.append(f'  {ids[name]}["<b>{_escape(short(name, 2))}</b><br/>{_escape(_summary(nodes))}"]')
    edges: dict[tuple[str, str], None] = {}
    inputs = {v.node: f"in{i}" for i, v in enumerate(graph.inputs.values())}
    for node in live:
        for value in node.inputs:
            source = inputs.get(value.node) or (ids.get(key(value.node)) if value.node.op not in _HIDDEN else None)
            if source is not None and source != ids[key(node)]:
                edges[(source, ids[key(node)])] = None
    for i, (name, value) in enumerate(graph.outputs.items()):
        lines.append(f'  out{i}(["{_escape(name)}"])')
        source = inputs.get(value.node) or ids.get(key(value.node) if value.node.op not in _HIDDEN else "")
        if source is not None:
            edges[(source, f"out{i}")] = None
    lines.extend(f"  {a} --> {b}" for a, b in edges)
    return "\n".join(lines) + "\n"


def side_by_side(before: str, after: str) -> str:
    """Two flowcharts as the two subgraphs of one."""
    lines = ["flowchart LR"]
    for title, text, prefix in (("before", before, "b_"), ("after", after, "a_")):
        lines.append(f"  subgraph {title}")
        lines.append("    direction TB")
        lines.extend("  " + _prefixed(line, prefix) for line in text.splitlines()[1:])
        lines.append("  end")
    return "\n".join(lines) + "\n"


def _prefixed(line: str, prefix: str) -> str:
    if "-->" in line:
        return re.sub(r"\b(g|in|out)(\d+)\b", rf"{prefix}\1\2", line)
    return re.sub(r"^(\s*)(g|in|out)(\d+)", rf"\1{prefix}\2\3", line)


def _grouping(nodes: list[Node]):
    """Names cut to the depth at which there are at most 40 groups."""
    paths = {n.name: n.name.split("/")[:-1] for n in nodes}
    deepest = max((len(p) for p in paths.values()), default=0)
    for depth in range(deepest, 0, -1):
        if len({tuple(p[:depth]) for p in paths.values()}) <= _MAX_GROUPS:
            break
    else:
        depth = 1
    return lambda node: "/".join(node.name.split("/")[:-1][:depth]) or node.op


def _summary(nodes: list[Node], most: int = 6) -> str:
    counts = Counter(n.op for n in nodes if n.op not in _SHAPING)
    shaping = sum(n.op in _SHAPING for n in nodes)
    parts = [op if n == 1 else f"{n} {op}" for op, n in counts.most_common(most)]
    rest = sum(counts.values()) - sum(n for _, n in counts.most_common(most))
    if rest:
        parts.append(f"{rest} more")
    if shaping:
        parts.append(f"{shaping} for shapes")
    return ", ".join(parts)


def _escape(text: str) -> str:
    return text.replace('"', "'").replace("_Fused", "Fused").replace("_Mkl", "Mkl").replace("#", "＃")
