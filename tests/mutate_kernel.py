"""Would the tests notice a wrong kernel? Plants one bug at a time in a copy of kernels.py and runs them.

    python tests/mutate_kernel.py

A bug counts as caught only when an assertion fails on a finite wrong number: a crash or a NaN would be
noticed anyway. Takes some minutes on one core; exits with 1 if a bug gets through.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = "seven or missing or share or shape or wide or strength or 30_a_step or handing"

BUGS = {  # name: (text, what the bug makes of it)
    "reverse mask not flipped": ("earlier = t[:, None] < t[None, :]", "earlier = t[:, None] > t[None, :]"),
    "forward mask flipped": ("else t[:, None] > t[None, :]", "else t[:, None] < t[None, :]"),
    "own step left out of the output": ("y += qk_same * v_c", "y += 0.0 * qk_same * v_c"),
    "own step counted twice, one decay per head": (
        "tl.where(earlier, gap, ",
        "tl.where(earlier | same, gap, ",
    ),
    "own step counted in d log a": ("x_y = y * tl.load", "x_y = (y + qk_same * v_c) * tl.load"),
    "own step of the values summed over a wrong axis": (
        "qk_same = tl.sum(q_c.to(tl.float32) * k_c, 1, keep_dims=True)",
        "qk_same = tl.sum(q_c.to(tl.float32) * q_c, 1, keep_dims=True)",
    ),
    "d_in and d_out swapped in reverse": (
        "d_out = tl.exp2(b_c if REVERSE else b_L - b_c)",
        "d_in, d_out = (tl.exp2(b_c), tl.exp2(b_L - b_c)) if REVERSE else (d_in, tl.exp2(b_L - b_c))",
    ),
    "d_in and d_out swapped in forward": (
        "d_out = tl.exp2(b_c if REVERSE else b_L - b_c)",
        "d_in, d_out = (d_in, tl.exp2(b_c)) if REVERSE else (tl.exp2(b_L - b_c), tl.exp2(b_c))",
    ),
    "pair decay not flipped in reverse": ("gap = tl.trans(b_c) - b_c if REVERSE else", "gap ="),
    "e instead of 2 as the base": ("scores *= tl.exp2(", "scores *= tl.exp("),
    "entering state not decayed, key rows": ("tl.dot((q_c * d_in).to(in_dtype)", "tl.dot(q_c.to(in_dtype)"),
    "entering state not decayed, one decay per head": (
        'y = tl.dot(q_c, S.to(in_dtype), input_precision="ieee") * d_in\n                y = tl.dot(scores',
        'y = tl.dot(q_c, S.to(in_dtype), input_precision="ieee")\n                y = tl.dot(scores',
    ),
    "entering state not decayed, value columns": (
        'y = tl.dot(q_c, S.to(in_dtype), input_precision="ieee") * d_in\n                for level',
        'y = tl.dot(q_c, S.to(in_dtype), input_precision="ieee")\n                for level',
    ),
    "entering state not read, key rows": (
        'y = tl.dot((q_c * d_in).to(in_dtype), S.to(in_dtype), input_precision="ieee")',
        "y = tl.zeros((L, BLOCK), tl.float32)",
    ),
    "state not decayed, key rows": ("S *= tl.trans(tl.exp2(b_L))", "S *= 1.0"),
    "state not decayed, value columns": ("                S *= tl.exp2(b_L)\n", "                S *= 1.0\n"),
    "k not decayed to the end of the chunk": ("k_c = (k_c * d_out).to(in_dtype)", "k_c = k_c.to(in_dtype)"),
    "v not decayed to the end of the chunk": ("v_c = (v_c * d_out).to(in_dtype)", "v_c = v_c.to(in_dtype)"),
    "q not decayed from the midpoint": ("q_mid = (q_c * to_mid)", "q_mid = q_c"),
    "k not decayed to the midpoint": ("k_mid = (k_c * to_mid)", "k_mid = k_c"),
    "v not decayed to the midpoint": ("v_mid = (v_c * to_mid)", "v_mid = v_c"),
    "output not decayed from the midpoint": ('input_precision="ieee") * to_mid', 'input_precision="ieee")'),
    "halves told apart the wrong way round": (
        "tl.where(second[:, None], b_c - b_mid",
        "tl.where(~second[:, None], b_c - b_mid",
    ),
    "topmost level missing": ("int(math.log2(chunk))", "int(math.log2(chunk)) - 1"),
    "levels overlap": ("(piece[:, None] == piece[None, :])", "(piece[:, None] // 2 == piece[None, :] // 2)"),
    "levels read both ways": ("return to_mid, earlier & ", "return to_mid, "),
    "last decay of a ragged chunk taken too early": (
        "b_L = tl.load(b + (t0 + L - 1)",
        "b_L = tl.load(b + (t0 + tl.maximum(tl.minimum(T - t0, L) - 2, 0))",
    ),
    "wrong group for q": ("i_h // (H // HQ)", "i_h % HQ"),
    "wrong group for k": ("i_h // (H // HK)", "i_h % HK"),
    "wrong group for log_a": ("i_h // (H // HB)", "i_h % HB"),
    "wrong group for x in d log a": ("t0) * HV + i_h // (H // HV)", "t0) * HV + i_h % HV"),
    "d log a: sum backward in time": ("[:, :-1]], 1).cumsum(1)", "[:, :-1]], 1).flip(1).cumsum(1).flip(1)"),
    "d log a: sum with the step itself": (
        "torch.cat([initial, (k_dk - q_dq)[:, :-1]], 1).cumsum(1)",
        "initial + (k_dk - q_dq).cumsum(1)",
    ),
    "d log a: q added instead of taken away": ("(k_dk - q_dq)", "(k_dk + q_dq)"),
    "d log a: the initial state left out": ("torch.cat([initial, ", "torch.cat([0 * initial, "),
    "d log a: what step T writes and R_T reads taken away": (
        "torch.cat([initial, ",
        "torch.cat([initial - k_dk[:, -1:], ",
    ),
    "d log a: what step T writes and R_T reads added": (
        "torch.cat([initial, ",
        "torch.cat([initial + k_dk[:, -1:], ",
    ),
    "d log a: what the first step writes and reads left out": (
        "(k_dk - q_dq)[:, :-1]]",
        "((torch.arange(q.shape[1], device=q.device) > 0)[:, None, None] * (k_dk - q_dq))[:, :-1]]",
    ),
    "d log a: partial sums of the blocks not added": (
        "(x.sum(3, keepdim=True) for x in (initial, q_dq, k_dk))",
        "(initial.sum(3, keepdim=True), q_dq[..., :1], k_dk[..., :1])",
    ),
    "d log a: sum of the initial state over a wrong axis": (
        "(state * dstate).sum(3)[:, None]",
        "(state * dstate).sum(2)[:, None, :, : b.shape[3]].expand(-1, -1, -1, b.shape[3])",
    ),
    "heads that share a tensor: first one only": (
        "(x.shape[2], -1)).sum(3, dtype=torch.float32).to(x.dtype)",
        "(x.shape[2], -1))[:, :, :, 0]",
    ),
    "dq ignores the initial state": ("b, state.mT, ctx.tile", "b, 0 * state.mT, ctx.tile"),
    "dk ignores the gradient of the final state": ("b, dfinal.mT, ctx.tile", "b, 0 * dfinal.mT, ctx.tile"),
    "dv runs forward in time": ("ctx.tile, reverse=True", "ctx.tile, reverse=False"),
    "dk runs forward in time": ("x=k, reverse=True", "x=k, reverse=False"),
    "strides of a transposed state ignored": (
        "col_k[:, None] * state_k + col_v[None, :] * state_v",
        "col_k[:, None] * V + col_v[None, :]",
    ),
    "value heads put together in the wrong order": (
        "final.unflatten(1, (H, parts)).transpose(2, 3)",
        "final.unflatten(1, (parts, H)).transpose(1, 2).transpose(2, 3)",
    ),
    "b runs on from chunk to chunk": (
        "unflatten(1, (-1, chunk)).cumsum(2)",
        "cumsum(1).unflatten(1, (-1, chunk))",
    ),
}


def plant(source, text, bug):
    """The failed assertion's message, "" if the tests passed, or how else they ended."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "tests", Path(folder, "tests"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        Path(folder, "kernels.py").write_text(source.replace(text, bug))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            TESTS,
            "tests/test_triton.py",
        ]
        done = subprocess.run(
            command, cwd=folder, env=os.environ | {"PYTHONPATH": folder}, capture_output=True, text=True
        )
    errors = re.findall(r"^E +(.*)$", done.stdout, re.MULTILINE)
    return errors[0] if errors else "" if done.returncode == 0 else done.stdout[-300:] + done.stderr[-300:]


def main():
    source = (ROOT / "kernels.py").read_text()
    for name, (text, _) in BUGS.items():
        if source.count(text) != 1:
            sys.exit(f"the text of bug {name!r} should be in kernels.py once: {text!r}")
    if outcome := plant(source, "", ""):
        sys.exit(f"the tests fail without any bug: {outcome}")
    caught = 0
    for name, (text, bug) in BUGS.items():
        outcome = plant(source, text, bug)
        finite = re.match(r"AssertionError: .* is off by \d\.\de[+-]\d+,", outcome)
        caught += bool(finite)
        print(
            f"{'caught' if finite else 'MISSED'}  {name:<50} {outcome.removeprefix('AssertionError: ')}",
            flush=True,
        )
    print(f"{caught} of {len(BUGS)} bugs caught by an assertion on a finite number")
    sys.exit(caught < len(BUGS))


if __name__ == "__main__":
    main()
