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
TESTS = "seven or missing or share or shape or wide or strength or segments or 30_a_step or handing"

BUGS = {  # name: (text, what the bug makes of it)
    "reverse mask not flipped": ("earlier = t[:, None] < t[None, :]", "earlier = t[:, None] > t[None, :]"),
    "forward mask flipped": ("else t[:, None] > t[None, :]", "else t[:, None] < t[None, :]"),
    "own step left out, one decay per head": ("else earlier | same", "else earlier"),
    "own step counted in d log a": ("reads = earlier if qdq is not None else", "reads ="),
    "own step left out, one decay per channel": (
        "A = tl.where(same, tl.sum(q_t",
        "A = tl.where(earlier, 0 * tl.sum(q_t",
    ),
    "own step left out of dq and dk": ("(y if qdq is None else y + y_same).to(dtype)", "y.to(dtype)"),
    "c_in and c_out swapped in reverse": (
        "c_out = tl.exp2(b_t if REVERSE else b_L - b_t)",
        "c_in, c_out = (tl.exp2(b_t), tl.exp2(b_L - b_t)) if REVERSE else (c_in, tl.exp2(b_L - b_t))",
    ),
    "c_in and c_out swapped in forward": (
        "c_out = tl.exp2(b_t if REVERSE else b_L - b_t)",
        "c_in, c_out = (c_in, tl.exp2(b_t)) if REVERSE else (tl.exp2(b_L - b_t), tl.exp2(b_t))",
    ),
    "pair decay not flipped in reverse": ("gap = tl.trans(b_t) - b_t if REVERSE else", "gap ="),
    "e instead of 2 as the base": ("A *= tl.exp2(", "A *= tl.exp("),
    "entering state not decayed, key rows": ("tl.dot((q_t * c_in).to(dtype)", "tl.dot(q_t.to(dtype)"),
    "entering state not decayed, value columns": (
        'input_precision="ieee") * c_in',
        'input_precision="ieee")',
    ),
    "state not decayed, key rows": ("S *= tl.trans(tl.exp2(b_L))", "S *= 1.0"),
    "state not decayed, value columns": ("                S *= tl.exp2(b_L)\n", "                S *= 1.0\n"),
    "k not decayed to the end of the chunk": ("k_out = (k_out * c_out).to(dtype)", "k_out = k_out.to(dtype)"),
    "v not decayed to the end of the chunk": ("v_out = (v_out * c_out).to(dtype)", "v_out = v_out.to(dtype)"),
    "one half of the midpoint decay missing": ("(v_t * to_mid).to(dtype)", "v_t.to(dtype)"),
    "output not decayed from the midpoint": ('input_precision="ieee") * to_mid', 'input_precision="ieee")'),
    "halves told apart the wrong way round": (
        "tl.where(second[:, None], b_t - b_mid",
        "tl.where(~second[:, None], b_t - b_mid",
    ),
    "topmost level missing": ("tl.static_range(LEVELS)", "tl.static_range(LEVELS - 1)"),
    "levels overlap": ("(pair[:, None] == pair[None, :])", "(pair[:, None] // 2 == pair[None, :] // 2)"),
    "levels read both ways": ("tl.where(earlier & parted, scores", "tl.where(parted, scores"),
    "d log a: anchor leaves out two steps": ("(end - t0 - 1).to", "(end - t0 - 2).to"),
    "last decay of a ragged chunk taken too early": (
        "b_L = tl.load(b + (t0 + n - 1)",
        "b_L = tl.load(b + (t0 + tl.maximum(n - 2, 0))",
    ),
    "wrong group for q": ("i_h // (H // HQ)", "i_h % HQ"),
    "wrong group for k": ("i_h // (H // HK)", "i_h % HK"),
    "wrong group for log_a": ("i_h // (H // HB)", "i_h % HB"),
    "wrong group for x in d log a": ("i_h // (H // HX)", "i_h % HX"),
    "d log a: sum without the step itself": (
        "tl.cumsum(change, 0, reverse=True)",
        "(tl.cumsum(change, 0, reverse=True) - change)",
    ),
    "d log a: sum not carried to the next chunk": (
        "later += tl.sum(change, 0, keep_dims=True)",
        "later += 0.0",
    ),
    "d log a: last step of k not left out": ("tl.where(inner, xdx, 0.0)", "xdx"),
    "d log a: anchor keeps the last k v^T": ("k_out = tl.where(inner, k_t, 0.0)", "k_out = k_t"),
    "d log a: anchor of another head": (
        "end_sum + (i_bs * H + i_h) * V",
        "end_sum + (i_bs * H + (i_h + 1) % H) * V",
    ),
    "d log a: partial sums of the blocks not added": ("dlog_a = dlog_a.sum(2)", "dlog_a = dlog_a[:, :, 0]"),
    "heads that share a tensor: first one only": (
        "(x.shape[2], -1)).sum(3, dtype=torch.float32).to(x.dtype)",
        "(x.shape[2], -1))[:, :, :, 0]",
    ),
    "dq ignores the initial state": ("b, S.mT, tile, decay_mT", "b, 0 * S.mT, tile, decay_mT"),
    "dk ignores the gradient of the final state": ("b, R.mT, tile, decay_mT", "b, 0 * R.mT, tile, decay_mT"),
    "dv runs forward in time": (
        "launch_kernel(k, q, do, b, R, tile, decay, reverse=True",
        "launch_kernel(k, q, do, b, R, tile, decay, reverse=False",
    ),
    "segments chained in the wrong order": (
        "reversed(range(segments)) if reverse else",
        "range(segments) if reverse else",
    ),
    "segments enter with the wrong state": ("    return enter\n", "    return enter.roll(1, 1)\n"),
    "a segment's decay misses its last chunk": ("decays[i].sum(1)", "decays[i][:, :-1].sum(1)"),
    "segments start at the wrong step": ("start = i_s * segment", "start = i_s * (segment - 1)"),
    "strides of a transposed state ignored": (
        "c_k[:, None] * enter_k + c_v[None, :] * enter_v",
        "c_k[:, None] * V + c_v[None, :]",
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
