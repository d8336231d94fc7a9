"The baseline MAISI: MONAI's networks, schedulers and the released mask-to-CT function, by their stored numbers; strict files; the job."
import json, sys
import numpy as np
import pytest
import torch
from conftest import FIXTURES
from rules import fill, smooth_video
from fvae_nb.data.ct import read_ct
from fvae_nb.generation import maisi as M
from fvae_nb.generation.sampling import SamplingError
from fvae_nb.vaes.hub import MaisiNet
from fvae_nb.vaes.interface import WeightsError

FOLDER = FIXTURES / "maisi_pipeline"
IDS = np.array([0, 1, 3, 28, 32, 57, 115, 132, 200, 22, 63, 127])


def stored(name): return json.loads((FOLDER / f"{name}.json").read_text()), np.load(FOLDER / f"{name}.npz")


def report(name, got, want, atol, rtol=0.):
    got, want = (np.asarray(v, np.float64) for v in (got, want))
    assert got.shape == want.shape, name
    print(f"  {name}: largest difference {np.abs(got - want).max():.2e} (allowed {atol:g} + {rtol:g} of the value)")
    np.testing.assert_allclose(got, want, atol=atol, rtol=rtol, err_msg=name)


def label(x, y, z):
    i, j, k = np.ogrid[:x, :y, :z]
    out = IDS[(i//4 + 3*(j//4) + 5*(k//4)) % 12].astype(np.uint8)
    for axis in range(3):
        v = np.moveaxis(out, axis, 0); v[:2] = 0; v[-2:] = 0
    return torch.from_numpy(out)


def small(version):
    "The fixture's networks, filled by rule"
    config = json.loads((FOLDER / f"small_{version}.json").read_text())["config"]
    unet, control = M.maisi_networks(version, "cpu", small=True, use_flash_attention=False)
    for part, net in (("unet", unet), ("controlnet", control)):
        given = M.maisi_arguments(version, part, small=True) | dict(use_flash_attention=False)
        assert {k: given.get(k) for k in config[part]} == config[part]           # ours pass what the fixture's reference passed
        fill(net)
    return M.Maisi(version, unet, control, torch.nn.Identity(), 1., free=True)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_networks_as_stored(version, monkeypatch):
    facts, s = stored(f"small_{version}"); m = small(version); tol = facts["tolerance"]["atol"], facts["tolerance"]["rtol"]
    x = torch.from_numpy(smooth_video(4, 8, 8, 8, seed=3))[None]; t = torch.tensor(facts["input"]["timesteps"]); lab = label(32, 32, 32)
    monkeypatch.setattr(M, "body_regions", lambda ids, whole=M.body_regions: whole([28, 1]))       # the fixture's label holds every region and says chest and abdomen
    ask, cond = M._answers(m, lab, (.75, .75, 2.5), 1)
    with torch.no_grad():
        report("cond_embedding", m.controlnet.controlnet_cond_embedding(cond)[0], s["cond_embedding"], *tol)
        extra = dict(class_labels=torch.tensor([1])) if version == "v2" else {}
        down, middle = m.controlnet(x=x, timesteps=t, controlnet_cond=cond, **extra)
        for n, r in enumerate(down): report(f"residual_{n}", r[0], s[f"residual_{n}"], *tol)
        report("mid_residual", middle[0], s["mid_residual"], *tol)
        with M._embedded(m.controlnet, cond): report("out, embedding computed beforehand", ask(x, t)[0], s["out"], *tol)
        report("out, half the control", ask(x, t, .5)[0], s["out_scale_half"], *tol)
        region = {f"{w}_region_index_tensor": torch.tensor(facts["input"][f"{w}_region_index_tensor"]) for w in ("top", "bottom")} if version == "v1" else {}
        report("out, no control", m.unet(x=x, timesteps=t, spacing_tensor=torch.tensor([[75., 75., 250.]]), **extra, **region)[0], s["out_no_control"], *tol)
    if version == "v1": assert [[100*v for v in r] for r in M.body_regions(lab)] == [facts["input"][f"{w}_region_index_tensor"][0] for w in ("top", "bottom")]


def velocity(x, t): return torch.tanh(.7*x + np.cos(np.pi*t/1000)) - .25*x


def test_rectified_flow_as_stored():
    facts, s = stored("rflow"); tol = facts["tolerance"]["float32"]
    for size, f in facts["sizes"].items():
        times = M.maisi_scheduler("v2", 30, int(np.prod(f["latent"]))).timesteps
        report(f"times {size}", times.float(), s[f"timesteps30_{size}"], 0)
        lengths = M.step_lengths(times); report(f"steps {size}", lengths, s[f"dt30_{size}"], 1e-7); assert abs(sum(lengths) - f["sum_of_dt"]) < 1e-6
        assert abs(sum(M.step_lengths(times, exact=True)) - 1) < 1e-9
    scheduler = M.maisi_scheduler("v2", 5, 128*128*32); x = torch.from_numpy(smooth_video(4, 8, 8, 8, seed=11))[None]; half = x.half()
    for n, (t, end) in enumerate(zip(scheduler.timesteps, [*scheduler.timesteps[1:], torch.tensor(0.)])):
        x, x0 = scheduler.step(velocity(x, float(t)), t, x, end); report(f"step {n}", x[0], s["trajectory5"][n], tol["atol"], tol["rtol"])
        half = scheduler.step(velocity(half.float(), float(t)).half(), t, half, end)[0].half()
    report("predicted data", x0[0], s["pred_original_last"], tol["atol"], tol["rtol"]); report("half precision", half[0].float(), s["trajectory5_half_last"], .004)


def test_ddpm_as_stored(monkeypatch):
    facts, s = stored("ddpm"); scheduler = M.maisi_scheduler("v1")
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))
    report("abar", scheduler.alphas_cumprod, s["alphas_cumprod"], 1e-6); report("betas", scheduler.betas, s["betas"], 1e-7)
    start = torch.from_numpy(smooth_video(4, 8, 8, 8, seed=11))[None]; noises = []
    monkeypatch.setattr(torch, "randn", lambda *a, **k: noises[0])
    for t in (999, 500, 1, 0):
        noises[:] = [torch.from_numpy(s["noise"])[None]]
        before, x0 = scheduler.step(velocity(start, t), t, start)
        report(f"step at {t}", before[0], s[f"step_t{t}"], 1e-5, 1e-4); report(f"data at {t}", x0[0], s[f"x0_t{t}"], 1e-5, 1e-3 if t == 999 else 1e-4)
    with pytest.raises(SamplingError, match="fewer leave noise"): M.maisi_scheduler("v1", 50)


def test_whole_chain_as_stored():
    facts, s = stored("chain"); m = small("v2"); config = facts["config"]["autoencoder"]
    vae = MaisiNet(**{k: v for k, v in config.items()}).vae.eval().requires_grad_(False); fill(vae)
    m = M.Maisi("v2", m.unet, m.controlnet, vae, facts["scale_factor"], free=True)
    noise, lab = torch.from_numpy(smooth_video(4, 12, 8, 8, seed=9))[None], label(48, 32, 32); tol = facts["tolerance"]["latents"]
    report("times", M.maisi_scheduler("v2", 3, 12*64).timesteps.float(), s["timesteps"], 0)
    z = M.draw_latent(m, lab, (.75, .75, 2.5), noise, steps=3); report("latents", z[0], s["latents"], tol["atol"], tol["rtol"])
    g = M.draw_latent(m, lab, (.75, .75, 2.5), noise, steps=3, guidance=2.); report("latents, guidance 2", g[0], s["latents_cfg2"], tol["atol"], tol["rtol"])
    grey = M.decode_windows(m, z, (8, 8, 8), .4); report("decoded", grey[:24, :16, :16], s["raw_corner"], 5e-4, 1e-3)
    report("HU", M.to_hu(grey, lab), s["image"], facts["tolerance"]["image"]["atol"])
    again = M.draw_latent(m, lab, (.75, .75, 2.5), noise, steps=3, exact=True)
    assert 0 < float((again - z).abs().max()) < .5                               # exact steps end a little earlier


def test_conditions_as_stored():
    facts = json.loads((FOLDER / "conditioning.json").read_text())
    for n, bits in facts["bits"].items(): assert [k for k in range(8) if M.maisi_bits(torch.tensor([[[int(n)]]]))[0, k].item()] == bits, n
    for row in facts["body_region"]:
        if row["top_bottom"] == "ValueError":
            with pytest.raises(SamplingError, match="which part of the body"): M.body_regions(row["ids"])
        else: assert [list(map(int, v)) for v in M.body_regions(row["ids"])] == row["top_bottom"], row
    healed = M.remove_tumors(np.array(facts["remove_tumors"]["in"]).reshape(1, 1, -1)); assert healed.ravel().tolist() == facts["remove_tumors"]["out"]
    assert tuple(facts["maisi_dummies"]) == M.DUMMIES
    for z, want in facts["size_fitting_z"].items(): assert M._nearest(int(z), M.LONG) == want
    for ours, theirs in facts["table7_to_maisi"].items():
        got = M.to_maisi_labels(np.array([[[int(ours), 200, 30]]]))[0, 0, 0]
        assert got == (theirs if theirs != "beneath" else 200), ours              # nothing but body beside it
    assert M.to_maisi_labels(np.array([[[133, 30, 200]]])).tolist() == [[[30, 30, 200]]]


def test_full_size_keys():
    want = json.loads((FOLDER / "keys.json").read_text())
    for version, kind in (("v1", "ddpm"), ("v2", "rflow")):
        for part, net in zip(("unet", "controlnet"), M.maisi_networks(version)):
            assert {k: list(v.shape) for k, v in net.state_dict().items()} == {k: list(v) for k, v in want[f"{part}_{version}_{kind}-ct"].items()}


def test_counts_arithmetic_without_memory():
    from torch.utils.flop_counter import FlopCounterMode
    for version, flops in (("v1", (1.002, .419)), ("v2", (1.214, .426))):        # specs: TFLOP a step at 256 x 256 x 128, U-Net and ControlNet
        for net, kw, want in zip(M.maisi_networks(version), M.maisi_inputs(version, (256, 256, 128)), flops):
            with FlopCounterMode(display=False) as count: net(**kw)
            print(f"  {version} {type(net).__name__}: {count.get_total_flops()/1e12:.3f} TFLOP, expected {want}")
            assert abs(count.get_total_flops()/1e12 - want) < .02


def released(folder, version, extra=(), nested=True):
    "Files like the released ones, small"
    from monai.data import MetaTensor
    m = M.random_maisi(version, seed=5); kind = dict(v1="ddpm", v2="rflow")[version]
    more, loss = {k: torch.zeros(2, 2) for k in extra}, MetaTensor(torch.tensor(.1))
    if sys.version_info < (3, 11, 4): loss.meta.clear()       # there an enum is pickled as getattr(...), which no safe reader takes; the released files have its value
    torch.save(dict(unet_state_dict=m.unet.state_dict() | more, scale_factor=torch.tensor(.97), loss=loss, epoch=np.float64(3), optimizer_state_dict={"state": {}}), folder / f"diff_unet_3d_{kind}-ct.pt")
    torch.save(dict(controlnet_state_dict=m.controlnet.state_dict(), epoch=1), folder / f"controlnet_3d_{kind}-ct.pt")
    from fvae_nb.vaes.hub import MAISI
    torch.save(dict(unet_state_dict=m.autoencoder.state_dict()) if nested else m.autoencoder.state_dict(), folder / "autoencoder_v1.pt")
    return m


@pytest.fixture
def as_small(monkeypatch):
    "The loader builds small networks"
    whole = M.maisi_networks
    monkeypatch.setattr(M, "maisi_networks", lambda version, device="meta", small=True, **k: whole(version, device, True, **k))
    monkeypatch.setattr(M, "load_maisi", lambda folder: type("V", (), dict(net=MaisiNet(num_channels=[8, 8, 16], num_res_blocks=[1, 1, 1], norm_num_groups=4), weights="x"))())


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_released_layout_loads_strictly(tmp_path, as_small, version):
    made = released(tmp_path, version, ["down_blocks.1.attentions.0.attn.out_proj.weight", "down_blocks.1.attentions.0.attn.out_proj.bias"] if version == "v1" else ())
    m = M.find_maisi(f"maisi-{version}", tmp_path)
    assert m.scale == pytest.approx(.97) and len(m.weights) == 3 and m.device.type == "cpu"
    for a, b in ((m.unet, made.unet), (m.controlnet, made.controlnet)):
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_bad_files_are_refused_in_one_line(tmp_path, as_small):
    released(tmp_path, "v2", ["down_blocks.9.attentions.0.attn.out_proj.weight"])
    with pytest.raises(WeightsError, match="1 unknown"): M.find_maisi("maisi-v2", tmp_path)        # left over where nothing may be
    released(tmp_path, "v1", ["mystery.weight"])
    with pytest.raises(WeightsError, match="1 unknown"): M.find_maisi("maisi-v1", tmp_path)
    m = M.random_maisi("v1"); state = m.unet.state_dict(); first = next(iter(state)); del state[first]
    with pytest.raises(WeightsError, match="1 missing, first " + first): M.load_part(m.unet, state, "v1", "file")
    wrong, _ = M.maisi_networks("v1", "cpu", small=True, include_fc=True)
    with pytest.raises(WeightsError, match="include_fc=False"): M.load_part(wrong, wrong.state_dict(), "v1", "file")
    released(tmp_path, "v2"); file = tmp_path / "diff_unet_3d_rflow-ct.pt"
    torch.save(dict(unet_state_dict=M.random_maisi("v2").unet.state_dict()), file)
    with pytest.raises(WeightsError, match="scale_factor"): M.find_maisi("maisi-v2", tmp_path)
    file.write_bytes(file.read_bytes()[:5000] if file.stat().st_size > 5000 else b"x")
    with pytest.raises(WeightsError, match="damaged") as e: M.find_maisi("maisi-v2", tmp_path)
    assert "\n" not in str(e.value)
    class Evil:
        def __reduce__(self): return (print, ("ran",))
    torch.save(dict(unet_state_dict={}, scale_factor=Evil()), file)
    with pytest.raises(WeightsError): M.find_maisi("maisi-v2", tmp_path)
    with pytest.raises(WeightsError, match="controlnet_3d_rflow-ct.pt"): M.find_maisi("maisi-v2", tmp_path / "nowhere")


def test_the_job_draws_with_it_on_the_masks_grid(tmp_path):
    from fvae_nb.jobs import generate
    from fvae_nb.running.cases import done
    for name in ("maisi-v2-random",):
        params = generate.Params(run=str(tmp_path / name), generator=name, masks="phantom", phantoms=1, phantom_shape=(9, 40, 32), maisi_steps=2, text="none", device="cpu")
        run = generate.run(params); unit = run.units[0]; record = done(run, unit)
        made = read_ct(generate._payload(run, unit))
        assert made.synthetic and made.shape == (9, 40, 32) and unit.model == name and record["metrics"]["slices"] == 9
        before = generate._payload(run, unit).read_bytes(); generate.run(params.model_copy(update=dict(overwrite=True)))
        assert generate._payload(run, unit).read_bytes() == before
