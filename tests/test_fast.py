"The exact shortcuts: every lever and all together against diffusers' own class; the benchmark's rows run and carry their errors."
import copy
import json

import pytest
import torch

from fvae_nb.vaes.fast import LEVERS, fasten, fold_doubling, unfasten
from fvae_nb.vaes.hub import random_vae

GEN = torch.Generator().manual_seed(3)
NOISE = torch.rand(1, 1, 13, 32, 48, generator=GEN) * 2 - 1
INPUTS = {"noise": NOISE, "saturated": (NOISE * 20).clamp(-1, 1), "half air": torch.where(NOISE.cumsum(4) > 0, NOISE, -torch.ones(())), "air": torch.full_like(NOISE, -1), "one slice": NOISE[:, :, :1], "two slices": NOISE[:, :, :2]}


def worst(base, fast, x):
    a, b = base.encode(x), fast.encode(x)
    p, q = base.decode(a), fast.decode(a)
    return max(float((a.values - b.values).abs().max() / (a.values.max() - a.values.min()).clamp(min=1e-3)), float((p - q).abs().max() / 2))


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
@pytest.mark.parametrize("levers", [(l,) for l in LEVERS] + [LEVERS], ids=lambda l: "+".join(l))
def test_levers_change_nothing(name, levers):
    base, fast = random_vae(name, fast=False), random_vae(name, fast=False)
    fasten(fast.net.vae, levers)
    errors = {what: worst(base, fast, x) for what, x in INPUTS.items()}
    print(name, levers, {k: f"{v:.1e}" for k, v in errors.items()})
    assert max(errors.values()) <= 1e-5


def test_the_levers_are_really_pulled():
    "Not one of them is the class's own code under another name"
    vae = random_vae("wan2.2").net.vae
    changed = {type(m).__name__ for m in vae.modules() if "forward" in m.__dict__}
    assert {"WanCausalConv3d", "WanRMS_norm", "WanResidualBlock", "WanResidualUpBlock", "Sequential"} <= changed
    copied = copy.deepcopy(vae)
    for m in vae.parameters(): m.data.zero_()
    assert any(p.abs().max() > 0 for p in copied.parameters())                # a copy has weights of its own ...
    block = next(m for m in copied.modules() if type(m).__name__ == "WanResidualBlock")
    assert block.forward.__self__ is block                                    # ... and code bound to itself


def test_switched_off_again_bit_for_bit():
    base, fast = random_vae("wan2.1", fast=False), random_vae("wan2.1")
    fast.net.vae = unfasten(fast.net.vae); fast.net.group = 4
    assert torch.equal(base.encode(NOISE).values, fast.encode(NOISE).values)
    assert set(base.net.state_dict()) == set(fast.net.state_dict())


def test_a_stream_in_pieces_is_the_whole():
    vae = random_vae("wan2.1")
    whole = vae.encode(NOISE)
    pieces = torch.cat(list(vae.encode_stream([NOISE[:, :, :3], NOISE[:, :, 3:4], NOISE[:, :, 4:]])), 2)
    assert (whole.values - pieces).abs().max() <= 2e-5


def test_half_precision_keeps_its_norms_in_float32():
    vae = random_vae("wan2.1").net.vae
    norm = next(m for m in vae.modules() if type(m).__name__ == "WanRMS_norm")
    x = torch.randn(1, norm.gamma.shape[0], 2, 4, 4).bfloat16() * 1e-2
    assert norm(x).dtype == torch.bfloat16
    assert (norm(x).float() - norm(x.float())).abs().max() < 2e-2


@pytest.mark.parametrize("shape", [(4, 3, 5, 9), (1, 8, 1, 1)])
def test_doubling_folds_exactly(shape):
    torch.manual_seed(0)
    out, inner, h, w = shape
    weight, x = torch.randn(out, inner, 3, 3), torch.randn(2, inner, h, w)
    slow = torch.nn.functional.conv2d(torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest-exact"), weight, padding=1)
    assert (torch.nn.functional.conv_transpose2d(x, fold_doubling(weight), stride=2, padding=1) - slow).abs().max() < 2e-5


def test_counted_work_at_full_size():
    "One pass over all frames, against the released two passes of two windows: from shapes alone"
    from fvae_nb.jobs.benchmark import Params, generator_flop
    same, base, maisi = generator_flop(Params(size="smoke"))
    assert same["ratio"]["median"] < .48 and base["ratio"]["median"] < .2 and maisi["ratio"]["median"] < .7
    assert 440 < same["tflop"]["released"] < 470


def test_benchmark_rows_carry_speed_and_error(in_tmp):
    from fvae_nb.jobs.benchmark import keep, kept, run, Params, table
    done = run(Params(rows=["wan2.2", "surfaces", "files", "slice-convolution"], size="smoke", rounds=1, run="b"))
    rows = table(done.folder)
    assert len(rows) == 7 and all(r[3] > 0 and r[4] <= r[3] <= r[5] for r in rows)
    assert all(r[6] for r in rows), "a speed without its error"
    parts = kept(keep(done.folder, "b.json"))
    assert all(p["machine"]["torch"] and p["rows"][0]["seconds"]["base"] for p in parts) and json.loads(open("b.json").read()) == parts


def test_ratio_is_turn_by_turn():
    from fvae_nb.jobs.benchmark import ratio
    assert ratio([2, 4, 9], [1, 1, 3]) == dict(median=3, least=2, most=4)
