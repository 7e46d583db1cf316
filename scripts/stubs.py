"""What type checkers and editors read: a `.pyi` beside every module whose methods are added with `@patch`, which they do not follow: python scripts/stubs.py lah_nb FOLDER

`setup.py` writes them into the wheel; they are not kept in git.
"""
import ast, sys
from pathlib import Path

FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef


def patch_of(node):
    "The `@patch` of a function, and what it was told"
    for decorator in getattr(node, 'decorator_list', ()):
        name, keywords = (decorator.func, decorator.keywords) if isinstance(decorator, ast.Call) else (decorator, [])
        if isinstance(name, ast.Name) and name.id == 'patch': return decorator, {keyword.arg for keyword in keywords}
    return None, set()


def moved(node):
    "A patched function as the method that it becomes, and its class"
    decorator, told = patch_of(node)
    first = node.args.args[0]
    owner, first.annotation = first.annotation, None
    node.decorator_list.remove(decorator)
    node.decorator_list += [ast.Name(word) for key, word in (('as_prop', 'property'), ('cls_method', 'classmethod')) if key in told]
    return owner.id, node


def attributes(cls):
    "What `__init__` sets on `self`, and the class does not declare"
    declared = {name.id for node in cls.body for name in ast.walk(node) if isinstance(node, (ast.AnnAssign, ast.Assign)) and isinstance(name, ast.Name)} | {node.name for node in cls.body if isinstance(node, FUNCTIONS)}
    init = next((node for node in cls.body if isinstance(node, FUNCTIONS) and node.name == '__init__'), None)
    found = dict.fromkeys(node.attr for node in (ast.walk(init) if init else ()) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and getattr(node.value, 'id', '') == 'self')
    return [ast.AnnAssign(ast.Name(name), ast.Name('_Any'), None, 1) for name in found if name not in declared]


class Bodiless(ast.NodeTransformer):
    def visit_FunctionDef(self, node):
        if any(isinstance(inner, (ast.Yield, ast.YieldFrom)) for inner in ast.walk(node)):  # without its body, a generator is a function that returns one
            node = ast.FunctionDef(**dict(ast.iter_fields(node)))
            node.returns = node.returns or ast.Name('_Any')
        node.body = [ast.Expr(ast.Constant(...))]
        return node
    visit_AsyncFunctionDef = visit_FunctionDef


def stub(source):
    "The text of the stub, or nothing where a module patches nothing"
    tree = ast.parse(source)
    if not any(patch_of(node)[0] for node in tree.body): return ''
    classes, body = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}, []
    for node in tree.body:
        if patch_of(node)[0]:
            owner, method = moved(node)
            if owner in classes: classes[owner].body.append(method)
        elif not isinstance(node, ast.Expr): body.append(node)
    for cls in classes.values(): cls.body[:0] = attributes(cls)
    tree.body = [ast.ImportFrom('typing', [ast.alias('Any', '_Any')], 0), *body]
    return ast.unparse(ast.fix_missing_locations(Bodiless().visit(tree))) + '\n'


def write(package, folder):
    for path in sorted(Path(package).rglob('[a-z]*.py')):
        if text := stub(path.read_text(encoding='utf-8')):
            there = Path(folder)/path.relative_to(package).with_suffix('.pyi')
            there.write_text(text, encoding='utf-8')


if __name__ == '__main__': write(*sys.argv[1:])
