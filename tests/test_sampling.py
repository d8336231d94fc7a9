"From masks to a scan: the release's windows and chaining, ours without seams, the same volume every time."
import json, subprocess, sys
from dataclasses import replace
import numpy as np
import pytest
import torch
from torch import nn
from conftest import FIXTURES
from fvae_nb.data.ct import ct_volume
from fvae_nb.generation.conditions import encode_mask
from fvae_nb.generation.denoiser import Denoiser, DenoiserConfig
from fvae_nb.generation.diffusion import denoise, make_scheduler, noise_schedule
from fvae_nb.generation import sampling
from fvae_nb.generation.sampling import (SamplingConfig, SamplingError, chained_frame, find_generator, matched_windows, named_noise, released_runs, released_windows, sample, sample_steps)
from fvae_nb.generation.training import Generator, Scaling
from fvae_nb.vaes import interface
from fvae_nb.vaes.interface import Latent, load_vae

WINDOWS = json.loads((FIXTURES / "sampling/windows.json").read_text())["cases"]


@pytest.mark.parametrize("n", sorted(WINDOWS, key=int))
def test_windows_and_cuts_are_the_releases(n):
    facts, n = WINDOWS[n], int(n)
    first, second = released_windows(n), released_windows(n, 32)
    assert [list(w) for w in first] == facts["pass1_windows"] and [list(w) for w in second] == facts["pass2_windows"]
    assert [list(r) for r in released_runs(n)] == facts["fused_runs"]
    assert [a for a, _, _ in released_runs(n)][1:] == [s for s, _ in facts["seams_in_fused"]]
    assert first[-1][1] - first[-2][1] == facts["pass1_last_block_slices"]


def test_chained_ddim_is_the_releases():
    folder = FIXTURES / "denoiser"
    facts, data = json.loads((folder / "ddim.json").read_text()), np.load(folder / "ddim.npz")
    case, shape = facts["cases"]["eta1_chained"], facts["input"]["shape"]
    draw = lambda seed, shape: torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))
    ours = lambda x: x.transpose(0, 1)[None]                              # the fixture folds frames into the batch: (F, C, H, W)
    abar, cond = noise_schedule()["alphas_cumprod"], ours(draw(2, shape))
    def predict(z, t):
        a = abar[int(t)]
        return (1 - a).sqrt()*z/(1 - .75*a) + .05*torch.sin(3*z) + .1*cond
    steps = case["steps"]
    noise, chain = draw(case["noise_seed"], (steps, *shape)), draw(case["noise_seed"] + 1, (steps + 1, 1, 1, *shape[1:]))
    before = draw(4, (1, 1, *shape[1:])).transpose(1, 2)
    z = ours(draw(1, shape)).clone(); z[:, :, :1] = chained_frame(before, 999, chain[0].transpose(1, 2))
    def after(z, step):
        level = steps - 1 - step
        z = z.clone(); z[:, :, :1] = chained_frame(before, level, chain[step + 1].transpose(1, 2)); return z
    out = denoise(predict, z, make_scheduler("eps", "ddim", steps, True), 1., lambda step: ours(noise[step]), after)
    wanted = ours(torch.from_numpy(data["eta1_chained.output"]))
    print("largest difference", float((out - wanted).abs().max()))
    assert torch.allclose(out, wanted, atol=2e-5)


class Oracle(nn.Module):
    "Knows the clean latent: half of the first 16 channels of the condition"
    def __init__(self, objective="flow"):
        super().__init__()
        self.p, self.objective, self.asked = nn.Parameter(torch.zeros(1)), objective, []
        self.config = DenoiserConfig(latent=16, condition=48, text=8, channels=(32,), blocks=1, attention=(False,))
    def forward(self, z, t, condition=None, text=None):
        from fvae_nb.generation.diffusion import amplitudes
        self.asked.append(z.shape[2])
        x = condition[:, :16]/2
        a, s = amplitudes(t.flatten()[:1], self.objective)
        return (z - x)/s if self.objective == "flow" else (z - a*x)/s


def _generator(model, **config):
    return Generator(model, dict(objective="flow", vae="tiny", mask_code="lattice", text_encoder=None, dropout=.1, mode="whole", frames=17, tokens=4) | config, Scaling())


def _masks(n, h=32, w=32, seed=0):
    rng = np.random.default_rng(seed)
    organs = np.full((n, h, w), 200, np.uint8); organs[:, 8:24, 6:20] = 30; organs[n//2:, 20:28, 20:28] = 115; organs[:, :2] = 0
    organs[rng.integers(0, n, n//2), 4:8, 24:28] = 70
    return ct_volume(organs, (5., 3., 3.), "case")


@pytest.fixture(scope="module")
def tiny(): return load_vae("tiny")


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    net = Denoiser(DenoiserConfig(latent=16, condition=48, text=8, channels=(32, 32), blocks=1, attention=(False, False), slices="dense")).eval()
    with torch.no_grad():
        for p in net.parameters(): p.add_(.02*torch.randn_like(p))
    return net


@pytest.mark.parametrize("objective,sampler", [("flow", "flow"), ("flow", "dpm"), ("flow", "unipc"), ("eps", "ddim"), ("eps", "dpm"), ("eps", "unipc")])
def test_a_network_that_knows_gets_there_with_every_sampler(tiny, objective, sampler):
    organs = _masks(9)
    out = sample(_generator(Oracle(objective), objective=objective), tiny, organs, config=SamplingConfig(sampler=sampler, steps=10))
    wanted = tiny.decode(Latent(encode_mask(tiny, organs.array)[:, :16]/2, organs.shape, "tiny"))[0, 0].numpy()*1000
    rough = 60 if objective == "eps" else 2         # the eps road ends at timestep 1, where a little noise is left
    assert np.abs(out.array - wanted).mean() < rough and out.synthetic and out.shape == organs.shape and np.array_equal(out.affine, organs.affine)


@pytest.mark.parametrize("length", ["whole", "fused", "matched", "released"])
@pytest.mark.parametrize("n", [1, 4, 66, 130, 151])
def test_every_slice_of_any_length_is_drawn_in_its_place(tiny, length, n):
    "The oracle's scan is a function of the masks, so a slice in the wrong place would show"
    organs = _masks(n)
    out = sample(_generator(Oracle()), tiny, organs, config=SamplingConfig(steps=4, length=length, window=9, overlap=4))
    assert out.shape == organs.shape and np.isfinite(out.array).all()
    def road(a, b): return tiny.decode(Latent(encode_mask(tiny, organs.array[a:b])[:, :16]/2, (b - a, 32, 32), "tiny"))[0, 0].numpy()*1000
    if length in ("whole", "fused"): wanted = road(0, n)
    elif n < 65: return
    elif length == "matched":
        wanted = np.zeros(organs.shape, np.float32); filled = 0
        for a, b in matched_windows(n): wanted[filled:b] = road(a, b)[filled - a:]; filled = b
    else:
        passes = [0, np.zeros(organs.shape), np.zeros(organs.shape)]
        for number, first in ((1, 0), (2, 32)):
            filled = first
            if n - first < 65: continue
            for a, b in released_windows(n, first): passes[number][filled:b] = road(a, b)[filled - a:]; filled = b
        wanted = np.concatenate([passes[p][a:b] for a, b, p in released_runs(n)]) if n >= 97 else passes[1]
    wrong = np.abs(out.array - wanted).mean((1, 2))
    worst = 3 if length in ("whole", "fused") else 400
    assert np.median(wrong) < 3 and wrong.max() < worst         # chained frames may differ where what is pinned differs


class Recorder(Oracle):
    "Answers anything, and keeps what it was shown"
    def __init__(self): super().__init__(); self.shown = []
    def forward(self, z, t, condition=None, text=None):
        self.shown.append((z.clone(), float(t.flatten()[0])))
        return .3*z + .1*condition[:, :16]


@pytest.fixture
def drawn(monkeypatch):
    "The latents of windows as they are decoded, on the network's scale"
    seen, decode = [], sampling._Task.decode
    monkeypatch.setattr(sampling._Task, "decode", lambda task, z, slices: (seen.append(z.clone()), decode(task, z, slices))[1])
    return seen


def test_frame_0_of_a_released_window_is_what_the_release_puts_there(tiny, drawn):
    "At each call: the last frame of the window before, at the level of the step's index counted down (the release's mistake), under noise of its own"
    net, steps, abar = Recorder(), 4, noise_schedule()["alphas_cumprod"]
    sample(_generator(net, objective="eps"), tiny, _masks(130), config=SamplingConfig(sampler="ddim", steps=steps, length="released", released_times=True, seed=3), case="c")
    assert len(net.shown) == 4*steps and len(drawn) == 4                                   # slices 0 and 65, then 32 and 65 again
    for number, first in ((1, 0), (2, 2)):                                                 # the pass, and which of the drawn windows begins it
        start, follows = drawn[first], net.shown[(first + 1)*steps:(first + 2)*steps]
        previous = start[:, :, -1:]
        def wanted(level, step): return abar[level].sqrt()*previous + (1 - abar[level]).sqrt()*named_noise(previous.shape, 3, "c", number, 1, "chain", step)
        assert [t for _, t in follows] == [751, 501, 251, 1]
        levels = [(999, -1)] + [(steps - 1 - step, step) for step in range(steps)]         # before the first call, then after every step
        for (z, _), (level, step) in zip(follows, levels): assert torch.allclose(z[:, :, :1], wanted(level, step), atol=1e-5), (number, step)
        assert torch.allclose(drawn[first + 1][:, :, :1], wanted(0, steps - 1), atol=1e-5)
        assert torch.equal(follows[0][0][:, :, 1:], named_noise(start.shape, 3, "c", number, 1, "start")[:, :, 1:])
        assert torch.equal(net.shown[first*steps][0], named_noise(start.shape, 3, "c", number, 0, "start"))


@pytest.mark.parametrize("objective,sampler", [("eps", "ddim"), ("flow", "flow"), ("eps", "dpm")])
def test_matched_windows_pin_what_is_drawn_at_the_level_of_the_call(tiny, drawn, objective, sampler):
    "At each call the shared slices, encoded alone, under noise of that call's level; in the end without noise"
    from fvae_nb.data.ct import window_ct
    from fvae_nb.generation.diffusion import amplitudes
    net, steps, scaling = Recorder(), 4, Scaling(.1, 2.)
    out = sample(replace(_generator(net, objective=objective), scaling=scaling), tiny, _masks(130), config=SamplingConfig(sampler=sampler, steps=steps, length="matched"), case="c")
    assert len(net.shown) == 3*steps
    for k, (a, slices, frames) in enumerate(((64, 1, 1), (65, 61, 16)), 1):                # of 64 known slices of the last window 61 fill whole frames
        pinned = scaling.enter(tiny.encode(torch.from_numpy(window_ct(out.array[a:a + slices]))[None, None]).values)
        own = named_noise(drawn[k].shape, 0, "c", 1, k, "start")
        assert pinned.shape[2] == frames
        for z, t in net.shown[k*steps:(k + 1)*steps]:
            x, s = amplitudes(torch.tensor([t]), objective)
            assert torch.allclose(z[:, :, :frames], x*pinned + s*own[:, :, :frames], atol=1e-4), (k, t)
        assert torch.equal(net.shown[k*steps][0][:, :, frames:], own[:, :, frames:])
        assert torch.allclose(drawn[k][:, :, :frames], pinned, atol=1e-4)


def test_the_authors_checkpoint_is_read_strictly(tmp_path, monkeypatch):
    "A small Lightning file with what lies beside the network in the released ones; a key of no known kind is refused"
    from fvae_nb.generation import denoiser
    from fvae_nb.generation.denoiser import DenoiserError, to_released
    small = DenoiserConfig(latent=4, condition=4, text=16, channels=(32, 64), blocks=1, attention=(False, True), head=8)
    monkeypatch.setattr(denoiser, "sized", lambda name, padding: small.model_copy(update=dict(padding=padding)))
    monkeypatch.setattr(interface, "find_weights", lambda entry: tmp_path)
    torch.manual_seed(2); net = Denoiser(small.model_copy(update=dict(padding="reflect"))).eval()
    for p in net.parameters(): nn.init.normal_(p, std=.05)
    state = {f"model.diffusion_model.{k}": v for k, v in to_released(net).items()} | {"betas": torch.zeros(1000), "first_stage_model.x": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    torch.save(dict(state_dict=state, epoch=61), tmp_path/"epoch=000061.ckpt")
    found = find_generator("official-multi")
    z, m, text, t = torch.randn(1, 4, 5, 8, 8), torch.randn(1, 4, 5, 8, 8), torch.randn(1, 7, 16), torch.tensor([700])
    with torch.no_grad(): assert torch.equal(found.model(z, t, m, text), net(z, t, m, text))
    assert (found.objective, found.mode, found.scaling.scale, found.model.config.padding) == ("eps", "released", 1.52, "reflect")
    torch.save(dict(state_dict=state | {"control.weight": torch.zeros(1)}), tmp_path/"epoch=000061.ckpt")
    with pytest.raises(DenoiserError, match="control.weight.*not of the released layout"): find_generator("official-multi")
    (tmp_path/"epoch=000061.ckpt").write_bytes(b"half a file")
    with pytest.raises(interface.WeightsError, match="damaged"): find_generator("official-multi")


def test_fused_windows_are_one_pass_for_a_network_without_slices(tiny):
    torch.manual_seed(1)
    net = Denoiser(DenoiserConfig(latent=16, condition=48, text=8, channels=(32,), blocks=1, attention=(False,), slices="none")).eval()
    with torch.no_grad():
        for p in net.parameters(): p.add_(.02*torch.randn_like(p))
    organs = _masks(60)
    whole, fused = (sample(_generator(net), tiny, organs, config=SamplingConfig(steps=3, length=l, window=6, overlap=3)).array for l in ("whole", "fused"))
    assert np.abs(whole - fused).max() < .5


@pytest.mark.parametrize("length,sampler", [("whole", "dpm"), ("fused", "flow"), ("matched", "flow"), ("released", "unipc"), ("auto", "flow")])
def test_how_many_calls_are_left_is_known(tiny, length, sampler):
    for n in (9, 66, 130):
        told = []
        sample(_generator(Oracle()), tiny, _masks(n), config=SamplingConfig(steps=3, length=length, sampler=sampler, window=9, overlap=4), tell=lambda *a: told.append(a))
        assert [c for c, _ in told] == list(range(1, len(told) + 1)) and {total for _, total in told} == {len(told)}


def test_network_is_asked_in_pieces_and_decoding_streams(tiny):
    oracle = Oracle()
    decoded = []
    class Counting(type(tiny)):
        def decode_stream(self, latents, shape, channels=1):
            def count():
                for z in latents: decoded.append(z.shape[2]); yield z
            return super().decode_stream(count(), shape, channels)
    vae = Counting(tiny.net, tiny.spec, tiny.weights)
    sample(_generator(oracle), vae, _masks(200), config=SamplingConfig(steps=2, length="fused", window=9, overlap=4))
    assert max(oracle.asked) == 9 and max(decoded) <= 4 and sum(decoded) == 51
    oracle.asked.clear(); sample(_generator(oracle), tiny, _masks(41), config=SamplingConfig(steps=2, longest=10))
    assert max(oracle.asked) == 11, "auto: 11 frames are more than 10, so fused windows of up to 17"


def test_same_name_same_volume(tiny, small):
    g, organs, c = _generator(small), _masks(13), SamplingConfig(steps=3)
    a, b = sample(g, tiny, organs, config=c, case="x"), sample(g, tiny, organs, config=c, case="x")
    assert np.array_equal(a.array, b.array)
    sample(g, tiny, organs, config=c, case="y")                                      # drawing another case between changes nothing
    assert np.array_equal(sample(g, tiny, organs, config=c, case="x").array, a.array)
    other = sample(g, tiny, organs, config=c, case="y").array
    seeded = sample(g, tiny, organs, config=SamplingConfig(steps=3, seed=1), case="x").array
    assert np.abs(other - a.array).mean() > 5 and np.abs(seeded - a.array).mean() > 5
    e = _generator(small, objective="eps"); c = SamplingConfig(steps=3, eta=1.)
    assert np.array_equal(sample(e, tiny, organs, config=c, case="x").array, sample(e, tiny, organs, config=c, case="x").array)


def test_masks_text_and_guidance_reach_the_network(tiny, small):
    organs, lesion = _masks(9), np.zeros((9, 32, 32), np.uint16)
    lesion[3:6, 12:18, 10:16] = 261
    g, c, text = _generator(small), SamplingConfig(steps=2), torch.randn(4, 8)
    plain = sample(g, tiny, organs, config=c).array
    assert np.abs(sample(g, tiny, organs, organs.with_array(lesion), config=c).array - plain).max() > 1
    guided = sample(g, tiny, organs, config=SamplingConfig(steps=2, guidance=3.)).array
    assert np.abs(guided - plain).max() > 1
    steps = list(sample_steps(g, tiny, organs, config=c))
    assert len(steps) == 2 and np.allclose(steps[-1][0].array, plain, atol=1e-2)


def test_what_cannot_work_is_told(tiny, small):
    organs = _masks(9)
    with pytest.raises(SamplingError, match="without dropping its conditions"): sample(_generator(small, dropout=0.), tiny, organs, config=SamplingConfig(guidance=2.))
    with pytest.raises(SamplingError, match="latent space of 'wan2.1'"): sample(_generator(small, vae="wan2.1"), tiny, organs)
    with pytest.raises(SamplingError, match="use the same file"): sample(_generator(small, vae_sha256="0"*64), tiny, organs)
    with pytest.raises(SamplingError, match="begin anywhere"): sample(_generator(small, mode="released"), tiny, organs, config=SamplingConfig(length="fused"))
    with pytest.raises(SamplingError, match="resample one onto the other"): sample(_generator(small), tiny, organs, _masks(10))
    with pytest.raises(SamplingError, match="use whole or fused"): sample(_generator(small, vae="dct-4x8x8-16"), load_vae("dct-4x8x8-16"), organs, config=SamplingConfig(length="matched"))
    with pytest.raises(SamplingError, match="length = matched: .*use auto, whole or fused"): next(sample_steps(_generator(small), tiny, organs, config=SamplingConfig(length="matched")))
    with pytest.raises(SamplingError, match="no such file or folder"): find_generator("nowhere/at/all")
    with pytest.raises(ValueError, match="at most half a window"): SamplingConfig(window=8, overlap=5)


_MEMORY = """
import sys, numpy as np, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from test_sampling import *
from test_sampling import _generator, _masks
torch.manual_seed(0)
net = Denoiser(DenoiserConfig(latent=16, condition=48, text=8, channels=(64, 64), blocks=1, attention=(False, False), slices='depthwise')).eval()
vae, n = load_vae('tiny'), int(sys.argv[1])
organs = _masks(n, 128, 128)
sample(_generator(net), vae, organs, config=SamplingConfig(steps=1, length='fused', window=9, overlap=2))
peak = next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))
print(peak * 1024, organs.array.size * 4)
"""


def test_memory_is_flat_beyond_input_and_output(tmp_path):
    from conftest import ROOT
    peaks = {}
    for n in (33, 129):
        out = subprocess.run([sys.executable, "-c", _MEMORY, str(n), str(ROOT / "tests")], capture_output=True, text=True, check=True, env={**__import__("os").environ, "OMP_NUM_THREADS": "1"})
        peaks[n] = [int(x) for x in out.stdout.split()]
    grown, volume = peaks[129][0] - peaks[33][0], peaks[129][1] - peaks[33][1]
    print(f"{grown/1e6:.0f} MB more for {volume/1e6:.0f} MB more of float32 volume")
    assert grown < 2.5*volume + 20e6            # the scan, its masks (a quarter each), the latents: 48 + 4 x 16 channels at 1/256 of the voxels


def test_the_packaged_generator_draws_what_the_masks_say(tiny):
    "A healthy chest and two nodules: HU where the masks say, the same file whoever asks, small enough to ship"
    from pathlib import Path
    import fvae_nb
    from fvae_nb.data.phantom import thorax_phantom
    from fvae_nb.generation.conditions import code_hash
    from fvae_nb.generation.sampling import group_hu, lesion_contrast, move_lesion
    assert (Path(fvae_nb.__file__).parent / "_data/weights/generator.safetensors").stat().st_size < 20e6
    generator = find_generator("tiny")
    assert generator.config["mask_code_sha256"] == code_hash("lattice") and generator.config["data"]["synthetic"] and generator.vae == "tiny"
    ph = thorax_phantom((17, 128, 128), (10., 3., 3.), seed=5, noise=False)
    lung = np.isin(ph.mask.array, range(28, 33))
    z, y, x = (n*s for n, s in zip(np.ogrid[:17, :128, :128], ph.mask.spacing))
    at = np.argwhere(lung & (np.indices(lung.shape)[2] < 50)).mean(0)*ph.mask.spacing
    first = ((z - at[0])**2 + (y - at[1])**2 + (x - at[2])**2 < 15**2) & lung
    second = move_lesion(first, lung, ph.mask.spacing)
    assert first.sum() > 50 and second.sum() > 50 and not (first & second).any()
    drawn = [sample(generator, tiny, ph.mask, ph.mask.with_array(np.where(m, 261, 0).astype(np.uint16)), config=SamplingConfig(steps=6), case="x").array for m in (first, second)]
    hu = group_hu(drawn[0], np.where(first, 261, ph.mask.array))
    assert hu["lung"] < -650 and -150 < hu["heart"] < 200 and hu["rib"] > 50 and hu["vertebra"] > 50 and hu["air"] < -950, hu
    host = lung & ~first & ~second
    c = [[lesion_contrast(d, m, host, ph.mask.spacing) for m in (first, second)] for d in drawn]
    print("contrast at the first and second place, asked for at the first, then at the second:", c)
    assert min(c[0][0], c[1][1]) > 150 and max(c[0][1], c[1][0]) < 100
