"""The bodies of loops and branches are simplified too."""

from functools import partial

from tfvllm.errors import InputError
from tfvllm.graph import functions
from tfvllm.graph.builder import Builder
from tfvllm.graph.guarantee import Approximate, Reordered
from tfvllm.graph.ir import Node, Value
from tfvllm.graph.rewriter import NodePass, Rewriter, Step

_OUTSIDE = ("FoldWeights",)  # makes variables, which a function would have to be handed


class RewriteBodies(NodePass):
    """while(c, f)(x) -> while(c', f')(x), and likewise for If and Case: the pipeline's own rules inside the functions.

    Rules that only approximate stay outside: a loop would add their errors up.
    """

    guarantee = Reordered()
    ops = frozenset(functions.CONTROL_FLOW)

    def begin(self, rewriter):
        steps = []
        for step in rewriter.pipeline:
            rules = tuple(r for r in step.rules if not isinstance(r.guarantee, Approximate) and r.name not in _OUTSIDE)
            if rules:
                steps.append(Step(step.name, rules, step.repeat))
        return partial(self._rewritten, rewriter, steps)

    def _rewritten(self, rewriter: Rewriter, steps: list[Step], b: Builder, node: Node) -> dict[Value, Value] | None:
        """Nothing is replaced: the node calls other functions from then on."""
        graph = b.graph
        shapes = functions.argument_shapes(node)
        renamed = {}
        for key in functions.CONTROL_FLOW[node.op]:
            for name in functions.names_in(node, key):
                if name in renamed or (name, str(shapes)) in rewriter.settled or name not in graph.library:
                    continue
                rewriter.settled.add((name, str(shapes)))
                try:
                    inner = functions.from_definition(graph, name, shapes)
                except InputError as error:
                    rewriter.decline(self, node, str(error))
                    continue
                part = Rewriter(inner, rewriter.target)
                part.run(steps)
                if not part.fired:
                    continue
                definition = functions.to_definition(inner, graph.library[name])
                renamed[name] = definition.signature.name
                graph.library.update(inner.library)
                graph.library[definition.signature.name] = definition
                rewriter.settled.add((definition.signature.name, str(shapes)))
        if not renamed:
            return None
        for key in functions.CONTROL_FLOW[node.op]:
            functions.rename(node, key, renamed)
        return {}
