"""Nodes that no result and no effect needs go."""

from tfvllm.graph.guarantee import Exact
from tfvllm.graph.rewriter import Pass


class DeleteDead(Pass):
    """f(x), read by nobody -> nothing."""

    guarantee = Exact()

    def run(self, rewriter):
        graph = rewriter.graph
        live = set(graph.live())
        live.update(v.node for v in graph.inputs.values())
        dead = [n for n in graph.nodes.values() if n not in live]
        for node in dead:
            graph.remove(node)
            graph.captures.pop(node.name, None)
        rewriter.removed_dead += len(dead)
        return False  # deleting what nobody reads gives no other rule a new chance
