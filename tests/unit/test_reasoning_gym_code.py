"""Which tasks of reasoning-gym run answers as code: the list in graftwork against the source of the package."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from graftwork.errors import ConfigError
from graftwork.rollouts.environment import Answer, load_environment
from graftwork.rollouts.reasoning_gym import EVALUATED

reasoning_gym = pytest.importorskip("reasoning_gym", reason="it needs a compiler to install: docs/environments.md")
DATASETS = pytest.importorskip("reasoning_gym.factory").DATASETS
PACKAGE = Path(reasoning_gym.__file__).parent
EVALUATORS = ("eval", "exec", "compile", "__import__", "parse_expr", "sympify", "parse_latex", "lambdify")
GIVEN_THE_ANSWER = {
    "algebra/intermediate_integration.py": "sympy.parse_expr(answer, local_dict={var: x, 'C': sympy.Symbol('C')})",
    "algebra/polynomial_multiplication.py": "sp.parse_expr(answer)",
    "algebra/simple_integration.py": "sympy.parse_expr(answer, local_dict={var: x, 'C': sympy.Symbol('C')})",
    "algorithmic/binary_matrix.py": "eval(answer)",
    "algorithmic/spiral_matrix.py": "eval(answer)",
    "algorithmic/string_insertion.py": "eval(answer)",
    "games/countdown.py": "parse_expr(answer)",
    "games/n_queens.py": "eval(answer)",
    "games/puzzle24.py": "parse_expr(answer)",
}
GIVEN_WHAT_THE_PACKAGE_MADE = {
    ("algebra/intermediate_integration.py", "sympy.parse_expr(metadata['integrand'], local_dict={var: x})"),
    ("algebra/polynomial_multiplication.py", "sp.parse_expr(entry['answer'])"),
    ("algebra/simple_integration.py", "sympy.parse_expr(metadata['integrand'], local_dict={var: x})"),
    ("algorithmic/number_sorting.py", "eval(entry['answer'])"),
    ("arithmetic/basic_arithmetic.py", "eval(exp.replace('/', '//'))"),
    ("arithmetic/bitwise_arithmetic.py", "eval(problem)"),
    ("arithmetic/bitwise_arithmetic.py", "eval(problem_str)"),
    ("arithmetic/gsm_symbolic/generators_00_49.py", "eval(rng.choice(fractions))"),
    ("arithmetic/gsm_symbolic/generators_50_99.py", "eval(fraction)"),
    ("code/codeio.py", "exec(full_code, local_vars, local_vars)"),
    # a function of the file's own that has this name
    ("logic/propositional_logic.py", "parse_expr(expr)"),
    ("logic/propositional_logic.py", "parse_expr(expr[1:-1])"),
    ("logic/propositional_logic.py", "parse_expr(left_expr)"),
    ("logic/propositional_logic.py", "parse_expr(right_expr)"),
    ("logic/propositional_logic.py", "parse_expr(sub_expr)"),
}
"""Read, at 0.1.25. What another version of the package adds has to be read too, and goes into one of these."""
USE_SYMPY_OTHERWISE = {"advanced_geometry", "polynomial_equations", "simple_equations"}
"""Read too: sympy's functions evaluate texts that they are given, and these tasks give them nothing of the answer."""


def evaluations(source: str) -> set[str]:
    """Every call of something that runs a text as code; its bare name where it gets another name or is passed on."""
    if not any(name in source for name in EVALUATORS):
        return set()
    nodes = list(ast.walk(ast.parse(source)))
    calls = {id(node.func): node for node in nodes if isinstance(node, ast.Call)}
    found = set()
    for node in nodes:
        if isinstance(node, ast.alias) and node.asname:
            name: str = node.name
        elif isinstance(node, ast.Name):
            name = node.id
        elif isinstance(node, ast.Attribute) and node.attr != "compile":  # re.compile
            name = node.attr
        else:
            continue
        if name in EVALUATORS:
            found.add(ast.unparse(calls[id(node)]) if id(node) in calls else name)
    return found


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("x = [eval(answer)]", {"eval(answer)"}),
        ("builtins.exec(answer)", {"builtins.exec(answer)"}),
        ("run = eval", {"eval"}),
        ("map(sympy.sympify, answers)", {"sympify"}),
        ("from sympy import sympify as s", {"sympify"}),
        ("from sympy import sympify", set()),
        ("re.compile('eval')", set()),
    ],
)
def test_a_planted_evaluation_is_seen(line: str, seen: set[str]) -> None:
    assert evaluations(line) == seen


def test_the_list_is_that_of_the_packages_source() -> None:
    found = {
        (path.relative_to(PACKAGE).as_posix(), call)
        for path in PACKAGE.rglob("*.py")
        for call in evaluations(path.read_text())
    }
    assert found == GIVEN_WHAT_THE_PACKAGE_MADE | set(GIVEN_THE_ANSWER.items())
    by_file = {
        name: GIVEN_THE_ANSWER.get(Path(inspect.getfile(dataset)).relative_to(PACKAGE).as_posix())
        for name, (dataset, _) in DATASETS.items()
    }
    evaluated = {
        name: "sympy's parse_expr" if "parse_expr" in call else "Python's eval"
        for name, call in by_file.items()
        if call
    }
    assert evaluated == EVALUATED
    assert len(evaluated) == len(GIVEN_THE_ANSWER)  # each file's task was found


def test_no_other_task_uses_sympy() -> None:
    files = {path for path in PACKAGE.rglob("*.py") if "sympy" in path.read_text()}
    users = {name for name, (dataset, _) in DATASETS.items() if Path(inspect.getfile(dataset)) in files}
    assert users == USE_SYMPY_OTHERWISE | {name for name, by in EVALUATED.items() if by == "sympy's parse_expr"}
    assert len(files) == len(users)


@pytest.mark.parametrize("name", EVALUATED)
def test_such_a_task_is_refused_unless_allowed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    mixture = {"datasets": [{"name": name, "weight": 1.0, "config": {}}]}
    for task, options in ((name, {}), (name, {"allow_eval": False}), ("composite", mixture)):
        with pytest.raises(ConfigError) as caught:
            load_environment(f"reasoning_gym:{task}", options)
        assert f"{name} gives answers to {EVALUATED[name]}" in str(caught.value)
        assert "allow_eval = true" in str(caught.value)
    for task, options in ((name, {}), ("composite", mixture)):
        environment = load_environment(f"reasoning_gym:{task}", {**options, "allow_eval": True})
        assert environment.score(environment.task(0, 0, "train"), Answer("no idea", (1,), "stop")) < 0.5
