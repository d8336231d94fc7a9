"The exact shortcuts: every lever and all together against diffusers' own class; the benchmark's rows run and carry their errors."
import copy
import json

import pytest
import torch

from fvae_nb.vaes.fast import LEVERS, compile_blocks, fasten, fold_doubling, unfasten
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


def test_a_first_chunk_is_one_frame():
    "WAN2.2's shortcut in a first chunk: the class cannot take two latent frames at once there, and neither do we"
    base, fast = random_vae("wan2.2", fast=False), random_vae("wan2.2")
    z = torch.randn(1, 48, 2, 2, 2)
    for vae in (base.net.vae, fast.net.vae):
        with torch.no_grad(), pytest.raises(RuntimeError): vae.decoder(vae.post_quant_conv(z), feat_cache=[None] * 64, feat_idx=[0], first_chunk=True)
    block = [next(m for m in v.net.vae.decoder.modules() if type(m).__name__ == "WanResidualUpBlock" and m.avg_shortcut is not None and m.avg_shortcut.factor_t == 2) for v in (base, fast)]
    x = torch.randn(1, block[0].in_dim, 1, 4, 4)
    with torch.no_grad(): a, b = (m(x, feat_cache=[None] * 16, feat_idx=[0], first_chunk=True) for m in block)
    assert (a - b).abs().max() <= 1e-5 * (a.max() - a.min())
    with torch.no_grad():                                                     # later chunks, of one frame and of three
        caches = [[None] * 16 for _ in block]
        for t in (1, 3, 1):
            x = torch.randn(1, block[0].in_dim, t, 4, 4)
            a, b = (m(x, feat_cache=c, feat_idx=[0], first_chunk=c[0] is None) for m, c in zip(block, caches))
            assert a.shape == b.shape and (a - b).abs().max() <= 1e-5 * (a.max() - a.min())


def light(name):
    "A network of this book's as its loader gives it: fast"
    if name != "taef2": return random_vae(name).net
    from fvae_nb.vaes.taef2 import TAEF2
    torch.manual_seed(0)
    return fasten(TAEF2(32, 8).eval().requires_grad_(False))


@pytest.mark.parametrize("name, levers", [("leanvae", ["onednn"]), ("wfvae", ["taps"]), ("wfvae", LEVERS), ("taef2", ["layout"]), ("taef2", ["doubling"]), ("taef2", LEVERS)], ids=str)
def test_light_networks_say_the_same(name, levers):
    plain = unfasten(light(name))
    fast = fasten(copy.deepcopy(plain), levers)
    assert set(plain.state_dict()) == set(fast.state_dict())
    assert any({"forward", "_conv_forward"} & set(m.__dict__) for m in fast.modules())
    for what, v in INPUTS.items():
        x = v.expand(-1, 3, -1, -1, -1) if name == "wfvae" else v.expand(-1, 3, -1, -1, -1) / 2 + (.5 if name == "taef2" else 0)
        if x.shape[2] == 2 and name != "taef2": continue                       # 1+4k frames
        with torch.no_grad():
            parts = [x[:, :, :5], x[:, :, 5:]] if x.shape[2] > 5 else [x]
            a, b = (torch.cat(list(n.encode_stream(parts)), 2) for n in (plain, fast))
            p, q = (torch.cat(list(n.decode_stream(a.split(1, 2))), 2) for n in (plain, fast))
        for u, w in ((a, b), (p, q)): assert (u - w).abs().max() <= 1e-5 * max(float(u.max() - u.min()), 1e-2), what


def test_taken_back_bit_for_bit():
    for name in ("leanvae", "wfvae", "taef2"):
        fast = light(name); plain = unfasten(copy.deepcopy(fast))
        again = unfasten(fasten(copy.deepcopy(plain)))
        assert not any({"forward", "_conv_forward", "compiled"} & set(m.__dict__) or "folded" in m._buffers for m in again.modules())
        x = torch.rand(1, 3, 5, 32, 32)
        with torch.no_grad(): assert torch.equal(plain.decode(plain.encode(x)), again.decode(again.encode(x)))


def test_gradients_and_half_precision_take_torchs_own_way():
    net = light("leanvae")
    x = (torch.rand(1, 3, 5, 16, 16) - .5).requires_grad_()
    net.encode(x).square().sum().backward()
    assert x.grad.abs().max() > 0
    with torch.no_grad(): assert net.bfloat16().encode(x.detach().bfloat16()).dtype == torch.bfloat16


@pytest.fixture
def compiler():
    import shutil
    if not any(map(shutil.which, ("g++", "clang++", "c++"))): pytest.skip("no C++ compiler for torch.compile")
    yield
    torch._dynamo.reset()


def test_compiled_blocks_say_the_same(compiler):
    "WAN's middle blocks (first frame, second piece, later pieces) and the denoiser's"
    from fvae_nb.generation.denoiser import Denoiser, DenoiserConfig
    plain, vae = random_vae("wan2.1"), random_vae("wan2.1")
    compile_blocks(vae.net.vae.decoder.mid_block)
    z = plain.encode(NOISE[:, :, :9, :16, :16])
    assert (plain.decode(z) - vae.decode(z)).abs().max() <= 2e-5
    torch.manual_seed(0)
    net = Denoiser(DenoiserConfig(latent=4, condition=4, text=16, channels=(32, 64), blocks=1, attention=(False, True), head=8)).eval()
    for p in net.parameters(): torch.nn.init.normal_(p, std=.05)
    quick = copy.deepcopy(net); compile_blocks(quick.unet.mid_block)
    args = torch.randn(1, 4, 5, 8, 8), torch.tensor([300]), torch.randn(1, 4, 5, 8, 8), torch.randn(1, 7, 16)
    with torch.no_grad(): a, b = net(*args), quick(*args)
    assert (a - b).abs().max() <= 1e-5 * (a.max() - a.min())
    from torch._dynamo.utils import counters
    assert counters["stats"]["unique_graphs"] >= 5 and not counters["graph_break"]


def test_compiling_is_asked_for_and_its_mode_handed_on(monkeypatch):
    from fvae_nb.generation.denoiser import Denoiser, sized
    seen, steps = [], []
    monkeypatch.setattr(torch, "compile", lambda f, **how: seen.append((f.__qualname__, how["mode"])) or f)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append(1))
    vae = random_vae("wan2.1")
    assert not any("compiled" in m.__dict__ for m in vae.net.modules())       # off by default
    before = vae.encode(NOISE[:, :, :5])
    compile_blocks(vae.net.vae, mode="reduce-overhead")
    assert torch.equal(vae.encode(NOISE[:, :, :5]).values, before.values) and len(steps) == 2     # a step a pass: first frame, rest
    assert seen == [("_residual", "reduce-overhead")]
    compile_blocks(Denoiser(sized("tiny")))
    assert {n for n, _ in seen[1:]} == {"ResnetBlock2D.forward", "FeedForward.forward"} and seen[1][1] is None
    unfasten(vae.net.vae)
    assert not any("compiled" in m.__dict__ for m in vae.net.modules())
    with pytest.raises(ValueError, match="no block to compile"): compile_blocks(torch.nn.Linear(2, 2))


def test_the_levers_are_really_pulled():
    "Not one of them is the class's own code under another name"
    vae = random_vae("wan2.2").net.vae
    changed = {type(m).__name__ for m in vae.modules() if "forward" in m.__dict__}
    assert {"WanCausalConv3d", "WanRMS_norm", "WanResidualBlock", "WanResidualUpBlock", "WanUpsample", "Conv2d"} <= changed
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
    assert torch.equal(norm(x), norm(x.float()).bfloat16())                   # rounded once, at the end


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
