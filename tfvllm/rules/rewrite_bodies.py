"""The bodies of loops and branches are simplified too."""

from tfvllm.errors import InputError
from tfvllm.graph import functions
from tfvllm.graph.guarantee import Approximate, Reordered
from tfvllm.graph.ir import Graph, Node
from tfvllm.graph.rewriter import Pass, Rewriter, Step

_OUTSIDE = ("FoldWeights",)  # makes variables, which a function would have to be handed


class RewriteBodies(Pass):
    """while(c, f)(x) -> while(c', f')(x), and likewise for If and Case: the pipeline's own rules inside the functions.

    Rules that only approximate stay outside: a loop would add their errors up.
    """

    guarantee = Reordered()

    def run(self, rewriter):
        graph = rewriter.graph
        steps = []
        for step in rewriter.pipeline:
            rules = tuple(r for r in step.rules if not isinstance(r.guarantee, Approximate) and r.name not in _OUTSIDE)
            if rules:
                steps.append(Step(step.name, rules, step.repeat))
        changed = False
        for node in graph.order():
            if node.op in functions.CONTROL_FLOW and rewriter.allowed(self, node):
                changed |= self._rewrite(rewriter, node, steps)
        return changed

    def _rewrite(self, rewriter: Rewriter, node: Node, steps: list[Step]) -> bool:
        graph: Graph = rewriter.graph
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
            return False
        for key in functions.CONTROL_FLOW[node.op]:
            functions.rename(node, key, renamed)
        rewriter.fire(self, node)
        return True
