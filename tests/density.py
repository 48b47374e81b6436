"""How dense the code is. Lines say little: two statements fit on one. So nodes of the syntax tree
are counted, without docstrings, annotations and the markers of operators."""

import ast

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTIONS)
MARKERS = (
    ast.expr_context,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
    ast.arguments,
)
DISPLAYS = (ast.Dict, ast.List, ast.Tuple, ast.Set)
NOT_COUNTED_AS_LARGE = (ast.ClassDef, ast.Import, ast.ImportFrom, *FUNCTIONS)


def without_text(tree):
    """The tree, with its docstrings and annotations removed."""
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        if isinstance(node, FUNCTIONS):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Load()  # a marker, which does not count
    return tree


def count(nodes):
    return sum(not isinstance(node, MARKERS) for node in nodes)


def own_nodes(statement):
    """The nodes of a statement without those of the statements inside it."""
    waiting = [statement]
    while waiting:
        node = waiting.pop()
        yield node
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.stmt):
                waiting.append(child)


def statements_in(node):
    """All statements inside a function or a module, but not itself."""
    return [x for x in ast.walk(node) if isinstance(x, ast.stmt) and x is not node]


def is_table(statement):
    """A table of data, such as a dict of constants: its size says nothing about how hard it is."""
    if not isinstance(statement, (ast.Assign, ast.AnnAssign)):
        return False
    inner = ast.walk(statement)
    is_display = isinstance(statement.value, DISPLAYS)
    return is_display and not any(isinstance(node, COMPREHENSIONS) for node in inner)


def parameters(function):
    arguments = function.args
    everything = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
    return [argument.arg for argument in everything if argument.arg not in ("self", "cls")]


class Density:
    """What the limits are about, of one file. Places are (size, "file:line")."""

    def __init__(self, source, name):
        self.name = name
        tree = without_text(ast.parse(source))
        self.nodes = count(ast.walk(tree))
        self.sizes = []  # nodes of each statement
        self.large = []
        self.long_functions = []
        self.wide_functions = []
        self.nested = []  # comprehensions inside comprehensions
        self.unpacked = []  # a, b = (f(x) for x in ...)
        for node in ast.walk(tree):
            if isinstance(node, ast.stmt):
                self.add_statement(node)
            if isinstance(node, FUNCTIONS):
                self.long_functions.append((len(statements_in(node)), self.place(node)))
                self.wide_functions.append((len(parameters(node)), self.place(node)))
            if isinstance(node, COMPREHENSIONS):
                inner = [x for x in ast.walk(node) if x is not node]
                if any(isinstance(x, COMPREHENSIONS) for x in inner):
                    self.nested.append(self.place(node))

    def add_statement(self, node):
        size = count(own_nodes(node))
        self.sizes.append(size)
        if not is_table(node) and not isinstance(node, NOT_COUNTED_AS_LARGE):
            self.large.append((size, self.place(node)))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            if isinstance(node.value, COMPREHENSIONS):
                self.unpacked.append(self.place(node))

    def place(self, node):
        return f"{self.name}:{node.lineno}"
