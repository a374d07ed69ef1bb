"""Whether this machine computes what it should: attention, sharding, compiled code."""

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional as F

from beitctl.engine.measuring import selfcheck, sharding_check
from beitctl.engine.measuring.selfcheck import Check
from beitctl.engine.shard import compute_dtype
from beitctl.examining.finding import Finding, guarded
from beitctl.model.attention import BACKENDS, available

HEADS = {"cuda": ((12, 64), (16, 88)), "cpu": ((2, 32),)}
"""Attention heads and their width that are tried: those of base and of the giant; on a CPU few and narrow."""
AUTOMATIC = ("padded", "varlen-flash")
"""Backends that are used without being asked for."""
REPORT = "do not train on this machine; update torch or the driver, or report these numbers"


def checks(device: torch.device) -> Iterator[Finding]:
    """Attention and sharding on a device."""
    for backend in BACKENDS:
        look = partial(_attention, backend, device)
        yield from guarded(f"attention {backend}", look, REPORT, "failed")
    yield from guarded("FSDP", partial(_sharding, device), REPORT, "failed")


def _attention(backend: str, device: torch.device) -> Iterator[Finding]:
    """A backend on a device; one that cannot run there is worth a line on GPUs alone."""
    name, dtype = f"attention {backend}", compute_dtype("auto", device)
    heads = HEADS[device.type]
    reason = next((why for _, size in heads if (why := available(backend, device, dtype, size))), "")
    if reason:
        if device.type == "cuda":
            yield Finding(name, "ok", f"not used: {reason}")
        return
    found = [check for n, size in heads for check in selfcheck.attends(backend, device, dtype, n, size)]
    bad = [check for check in found if not check.passed]
    if not bad:
        yield Finding(name, "ok", f"right in {_kind(dtype)}: {_errors(found[0])}")
    elif backend in AUTOMATIC:
        padded = backend == "padded"
        fix = REPORT if padded else 'set train.attention_backend = "padded", and report these numbers'
        yield Finding(name, "failed", f"wrong in {_kind(dtype)}: {bad[0]}", fix)
    else:
        fix = 'leave train.attention_backend as "auto"'
        yield Finding(name, "note", f"wrong in {_kind(dtype)}: {bad[0]}", fix)


def _sharding(device: torch.device) -> Iterator[Finding]:
    bad = [check for check in sharding_check.shards(device) if not check.passed]
    if bad:
        yield Finding("FSDP", "failed", "; ".join(map(str, bad)), REPORT)
    else:
        yield Finding("FSDP", "ok", "gradients as unsharded; a step that is not finite is left out")


def compiled(device: torch.device) -> Iterator[Finding]:
    """Compile one function and compare it with the plain one: seconds, some tens of them on a CPU."""
    try:
        x = torch.linspace(-3, 3, 1024, device=device)
        found = torch.compile(_small, fullgraph=True)(x)
    except Exception as error:
        text = f"fails: {type(error).__name__}: {error}".partition("\n")[0]
        yield Finding("torch.compile", "failed" if device.type == "cuda" else "note", text, _mend(device))
        return
    if torch.allclose(found, _small(x), atol=1e-5):
        yield Finding("torch.compile", "ok", "compiles, with the numbers of plain code")
    else:
        yield Finding("torch.compile", "failed", "compiled code gives other numbers", _mend(device))


def _small(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x) * 2 + x.mean()


def _mend(device: torch.device) -> str:
    if device.type == "cuda":
        return 'apt install gcc python3-dev, or what they are called here; or set train.compile = "off"'
    return 'install g++, or leave train.compile as "auto": on a CPU it compiles nothing'


def _errors(check: Check) -> str:
    grads = max(check.errors[part] for part in ("dq", "dk", "dv"))
    return f"errors {check.errors['out']:.0e}, gradients {grads:.0e}"


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
