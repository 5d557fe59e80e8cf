"""The bugs that `tests.mutate` plants one at a time.

`HAND` holds bugs that the tests once missed, `wiring` ignores one field of a recipe, and
`generated` makes small changes all over the package, from its syntax tree.
"""

import ast
import copy
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

SEED = 1337  # selects the generated bugs that are planted

# Bugs that no test can notice, and why.
EXPLAINED: dict[str, str] = {
    "loading.load: cast(nn.Module, loaded.model).to(device.torch) => pass": "no move on a CPU",
    "runtime.device.keep_freed_memory: 2 => 3 in 2 ** 25": "reached only with an older C library",
    "runtime.device.keep_freed_memory: 25 => 26 in 2 ** 25": "reached only with an older C library",
    "runtime.device.keep_freed_memory: 30 => 31 in 2 ** 30": "no test allocates a block of 1 GiB",
    "runtime.micro_batch.: 16 => 17 in 1 / 16": "a measured number; nearby values work as well",
    "checkpoint.format.: 2 => 3 in 2 ** 31": "a bound far above any length",
    "data.sources.jsonl.: 256 => 257 in 256 << 20": "a limit; nearby values work as well",
    "cli.commands.train: recipes.check(recipe) => pass": "`open_run` checks too, after torch",
    "sampling.decoding._generate: torch.compiler.cudagraph_mark_step_begin() => pass": "CUDA only",
    "checkpoint.writer.Snapshot.take: self._copied.record() => pass": "a GPU's copies only",
    "data.sources.local.LocalSource.close: sha256.cancel() => pass": "only saves time",
    "data.layout.Lecture._add_part: self._done(encoded, 0, part.ends) => pass": "the next part "
    "or document moves the cursor as well",
    "data.batches.Prefetcher._put: 0.1 => 0.2": "how often it checks whether to stop",
    "evaluate.loss.validation_loss: True => False #2": "on a CPU no copy is asynchronous",
    "data.sources.hub.HubSource._wait: not coming.done() => coming.done()": "a progress line",
    "data.sources.jsonl._buffered: 1 => 2 in 1 << 20": "the size of a buffer",
    "storage.files.remove_unfinished: True => False #2": "only if another removes a file meanwhile",
    "data.prepare._Preparation.__init__: 0 => 1 #2": "one more token in a line that rounds it",
}


@dataclass(frozen=True)
class Mutant:
    """A bug: `text` returns the complete module with the bug. `function` is the qualified name of
    its function, empty at module level."""

    name: str
    file: str
    function: str
    text: Callable[[], str]


class MovedError(Exception):
    """Raised if the code that a hand-written bug changes is not found in the package."""


# name, module, qualified name of the function, code now, code with the bug
HAND = [
    ("clip of 1.0", "trainer", "Trainer.train_step",
     "grad_clip=self.recipe.grad_clip", "grad_clip=1.0"),
    ("beta1 twice", "optim.adamw", "AdamW.__init__",
     "(config.beta1, config.beta2)", "(config.beta1, config.beta1)"),
    ("no weight decay", "optim.adamw", "AdamW.__init__", "config.weight_decay", "0.0"),
    ("data seed of 1337", "trainer", "build", "b.rows, recipe.seed,", "b.rows, 1337,"),
    ("weight seed of 1337", "trainer", "build", "manual_seed(recipe.seed)", "manual_seed(1337)"),
    ("all validation tokens", "evaluate.evaluator", "Evaluator.validate",
     "self.recipe.eval_tokens", "10_485_760"),
    ("FLOPs of block_size", "start", "_open_metrics",
     "flops_per_token(run.recipe.batch.length)", "flops_per_token(run.recipe.model.block_size)"),
    ("peak of one rank", "start", "_open_metrics", "peak * trainer.world.size if", "peak if"),
    ("waiting pieces unchecked", "data.prepare", "_Preparation._commit",
     "samples.check(str(self.folder / name))", "pass"),
    ("set aside, not flushed", "storage.files", "set_aside",
     "_flush_folder(folder.parent)", "pass"),
    ("bf16 softmax", "model.attention", "attend_once",
     "(k @ q.transpose(-2, -1)).float()", "(k @ q.transpose(-2, -1))"),
    ("half a Feistel round", "data.batches", "_feistel", "low_bits = high_bits", "pass"),
    ("no Feistel mixing", "data.batches", "_feistel", "high ^ (_scramble", "high ^ (0 * _scramble"),
    ("other order at odd widths", "data.batches", "_feistel",
     "low_bits = bits // 2", "low_bits = (bits + 1) // 2"),
    ("ids wrap", "data.shards", "_as_ids", "tokens.dtype != np.uint16", "False"),
    ("other validation hash", "data.sources.base", "validation_hash",
     'b"rekindle validation"', 'b"rekindle Validation"'),
    ("big-endian validation", "data.sources.base", "validation_hash", '"little"', '"big"'),
    ("schedule off by one", "optim.schedule", "learning_rate", "(step + 1) / warmup",
     "step / warmup"),
]  # fmt: skip


def by_hand(root: Path) -> Iterator[Mutant]:
    """Raises `MovedError` unless each snippet occurs exactly once in its function."""
    for name, module, function, old, new in HAND:
        file = f"rekindle/{module.replace('.', '/')}.py"
        text = (root / file).read_text() if (root / file).exists() else ""
        start, end = _span(text, function)
        if text[start:end].count(old) != 1:
            raise MovedError(
                f"{name}: {old!r} does not occur exactly once in {function} of {file}: update it"
            )
        changed = text[:start] + text[start:end].replace(old, new) + text[end:]
        yield Mutant(f"by hand: {name}", file, function, partial(str, changed))


def _span(text: str, function: str) -> tuple[int, int]:
    """Start and end of a function in its module, in characters; (0, 0) if it is missing."""
    for node, name in _functions(ast.parse(text)):
        if name == function:
            lines = text.splitlines(keepends=True)
            assert node.end_lineno
            return len("".join(lines[: node.lineno - 1])), len("".join(lines[: node.end_lineno]))
    return 0, 0


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[ast.stmt, str]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = f"{prefix}{node.name}"
            inner = f"{name}." if isinstance(node, ast.ClassDef) else f"{name}.<locals>."
            if isinstance(node, ast.FunctionDef):
                yield node, name
            yield from _functions(node, inner)


# Ignored fields: a field of a recipe keeps its value in records, but reads as its default in use.

_FIELDS = """
import dataclasses, json
from rekindle.recipes import Recipe
def walk(cls, prefix):
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default):
            yield from walk(type(field.default), prefix + field.name + ".")
        elif field.default_factory is not dataclasses.MISSING:
            yield from walk(field.default_factory, prefix + field.name + ".")
        elif field.default is not dataclasses.MISSING:
            yield prefix + field.name, cls.__module__, cls.__name__, field.name, field.default
print(json.dumps(list(walk(Recipe, ""))))
"""

_DEAF = """

class _Deaf:
    def __init__(self, name, default):
        self.name, self.default = name, default
    def __get__(self, it, cls=None):
        import sys
        frame = sys._getframe(1)
        file, own = frame.f_code.co_filename, frame.f_locals.get("self") is it
        records = file.endswith(("dataclasses.py", "<string>"))  # copies, compares
        records = records or file.endswith("recipes.py") and not own  # flattens, checks
        records = records or frame.f_code.co_name == "__post_init__"  # checks
        return it.__dict__[self.name] if it is not None and records else self.default
    def __set__(self, it, value):
        it.__dict__[self.name] = value
{cls}.{field} = _Deaf({field!r}, {default!r})
"""


def _longer(path: Path, text: str) -> str:
    return path.read_text() + text


def wiring(root: Path) -> Iterator[Mutant]:
    """One bug for each field with a default, so all but `name` and `about`."""
    found = subprocess.run(
        [sys.executable, "-c", _FIELDS], cwd=root, capture_output=True, text=True, check=True
    )
    for dotted, module, cls, field, default in json.loads(found.stdout):
        file = f"{module.replace('.', '/')}.py"
        deaf = _DEAF.format(cls=cls, field=field, default=default)
        yield Mutant(f"ignored: {dotted}", file, "", partial(_longer, root / file, deaf))


# Bugs from the syntax tree. All possible bugs are ranked by a hash of their names, so that a change
# of the package changes the selection only where it changes the code.

LEFT_OUT = {  # needs a GPU, is only run by multi-process tests, or is text for people
    "rekindle/__main__.py", "rekindle/demo.py", "rekindle/ladder.py",
    "rekindle/model/kernels/common.py", "rekindle/model/kernels/cross_entropy.py",
    "rekindle/model/kernels/mlp.py",
    "rekindle/observe/report.py", "rekindle/interop/verify.py", "rekindle/runtime/distributed.py",
    "rekindle/runtime/replicas.py", "rekindle/runtime/sharding.py", "rekindle/runtime/watchdog.py",
}  # fmt: skip
PATHS = re.compile("out|folder|path|parent|root", re.IGNORECASE)  # whose / is not a division
EITHER_WAY = {"max", "min", "isinstance", "cast", "next", "zip", "map", "getattr", "hasattr"}
TALK = {"say", "report", "print", "_print", "progress", "add_argument", "update", "_add", "at"}
COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Add, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip


@dataclass
class _Site:
    """A node `old` that can be replaced by `new`: the attribute or item `slot` of `holder`."""

    function: str
    holder: ast.AST | list
    slot: str | int
    old: ast.AST
    new: ast.AST

    def change(self) -> None:
        if isinstance(self.holder, list):
            assert isinstance(self.slot, int)
            self.holder[self.slot] = self.new
        else:
            setattr(self.holder, str(self.slot), self.new)

    def __str__(self) -> str:
        where = ""
        if isinstance(self.old, ast.Constant) and isinstance(self.holder, ast.expr):
            where = f" in {_short(self.holder)}"
        return f"{self.function}: {_short(self.old)} => {_short(self.new)}{where}"


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 60 else f"{text[:40]} ... {text[-15:]}"


def generated(root: Path, count: int) -> Iterator[Mutant]:
    """The first `count` of all possible bugs, by rank."""
    drawn = []
    for path in sorted((root / "rekindle").rglob("*.py")):
        file = path.relative_to(root).as_posix()
        if file in LEFT_OUT:
            continue
        module = file.removeprefix("rekindle/").removesuffix(".py").replace("/", ".")
        seen: Counter[str] = Counter()
        for number, site in enumerate(_sites(ast.parse(path.read_text()))):
            name = f"{module}.{site}"
            seen[name] += 1
            name += f" #{seen[name]}" if seen[name] > 1 else ""
            rank = hashlib.sha256(f"{SEED} {name}".encode()).digest()
            drawn.append((rank, name, path, file, number, site.function))
    for _, name, path, file, number, function in sorted(drawn)[:count]:
        yield Mutant(name, file, function, partial(_with_bug, path, number))


def _with_bug(path: Path, number: int) -> str:
    tree = ast.parse(path.read_text())
    for at, site in enumerate(_sites(tree)):
        if at == number:
            site.change()
            break
    return ast.unparse(tree)


def _sites(node: ast.AST, function: str = "", inner: str = "") -> Iterator[_Site]:
    """All sites below `node`, in a fixed order; `inner` is the prefix of names defined here."""
    if isinstance(node, ast.FunctionDef):
        function, inner = f"{inner}{node.name}", f"{inner}{node.name}.<locals>."
    elif isinstance(node, ast.ClassDef):
        function, inner = function, f"{inner}{node.name}."
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        pairs = enumerate(value) if isinstance(value, list) else [(field, value)]
        holder = value if isinstance(value, list) else node
        for slot, child in pairs:
            if not isinstance(child, ast.AST) or _is_talk(child):
                continue
            for new in _replacements(child):
                ast.fix_missing_locations(ast.copy_location(new, child))
                yield _Site(function, holder, slot, child, new)
            yield from _sites(child, function, inner)


def _is_talk(node: ast.AST) -> bool:
    """Whether `node` only produces text for people, or checks what cannot happen."""
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom):
        return True
    node = node.value if isinstance(node, ast.Expr) else node
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in TALK


def _replacements(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield ast.Constant(value * 2 if value else 1.0)
        case ast.Compare(ops=[op, *_]):
            changed = copy.deepcopy(node)
            changed.ops[0] = COMPARE[type(op)]()
            yield changed
        case ast.BoolOp(op=op, values=values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            if isinstance(op, ast.Div) and PATHS.search(ast.unparse(left)):
                return
            yield ast.BinOp(left, ARITHMETIC[type(op)](), right)
        case ast.Call(func=func, args=[first, second, *rest], keywords=keywords):
            plain = isinstance(first, ast.Name | ast.Attribute)
            plain = plain and isinstance(second, ast.Name | ast.Attribute)
            same = ast.unparse(first) == ast.unparse(second)
            if plain and not same and ast.unparse(func) not in EITHER_WAY:
                yield ast.Call(func, [second, first, *rest], keywords)
        case ast.AugAssign() | ast.Expr(value=ast.Call()):
            yield ast.Pass()
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield ast.IfExp(ast.UnaryOp(ast.Not(), test), body, orelse)
