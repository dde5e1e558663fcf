"""Instrument: rewrites a parsed chat template so that all it does is paid for.

Each loop turn, macro and block call, comparison, concatenation, slice and written list gets a payment or goes through
a method of the environment (`step`, `concat_values`, `slice_of`, `container`). What jinja hands to the environment
anyway (filters, tests, operators, calls) is left alone. Knows jinja's syntax tree and those four names.
"""

from collections.abc import Sequence

from jinja2 import nodes
from jinja2.visitor import NodeTransformer


class Instrument(NodeTransformer):
    """Makes a parsed template pay: see the module's docstring."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.Or(_step(), node.test)
        return _paying_body(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        return _paying_body(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        return _paying_body(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        self.generic_visit(node)
        return _paying_body(node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Or(_step(), node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concat_values", node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _call("slice_of", [node.node, *(bound or nodes.Const(None) for bound in bounds)])

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _container(node, node.items)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _container(node, node.items) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _container(node, [pair.value for pair in node.items])


def _paying_body(node: nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
    node.body.insert(0, nodes.ExprStmt(_step()))
    return node


def _step() -> nodes.Expr:
    return nodes.EnvironmentAttribute("step")


def _call(name: str, arguments: list[nodes.Expr]) -> nodes.Expr:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


def _container(node: nodes.Expr, items: Sequence[nodes.Expr]) -> nodes.Expr:
    """One written with constants only is as large as its source, and needs no payment."""
    return node if all(isinstance(item, nodes.Const) for item in items) else _call("container", [node])
