"Training of the denoiser: repeatable, resumable, shareable, honest about what it cannot do"
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
import pytest
import torch
from fvae_nb.generation.denoiser import Denoiser, DenoiserConfig
from fvae_nb.generation.training import Scaling, TrainingConfig, TrainingError, channel_weights, diffusion_loss, held_out_loss, load_generator, measure_scaling, newest_checkpoint, pack_generator, train, training_batch, whole_checkpoint
from fvae_nb.vaes.interface import WeightsError

TOY = DenoiserConfig(latent=3, condition=2, text=8, channels=(32, 32), blocks=1, attention=(False, False), slices="depthwise")


def toy_case(n, frames=5):
    g = torch.Generator().manual_seed(n)
    x = torch.randn(3, frames, 4, 4, generator=g) * torch.tensor([.1, 1., 4.])[:, None, None, None] + torch.tensor([5., 0., -2.])[:, None, None, None]
    return SimpleNamespace(case=f"toy{n}", ct=x, mask=torch.randn(2, frames, 4, 4, generator=g), text=torch.randn(2 + n % 3, 8, generator=g), meta={})


CASES = [toy_case(n) for n in range(7)]


def trained(folder, config, net=None, cases=CASES, facts=None):
    if net is None: torch.manual_seed(0); net = Denoiser(TOY)
    return net, train(net, cases, CASES[5:], folder, config, dict(vae="toy") | (facts or {}))


def numbers(curve): return [{k: v for k, v in row.items() if k != "seconds"} for row in curve]


@pytest.mark.parametrize("muon", [0., .01])
def test_a_run_cut_in_two_is_the_run(tmp_path, muon):
    config = TrainingConfig(steps=8, every=4, batch=2, lr=1e-3, warm=2, muon=muon, ema=.9, constant=1.)
    whole, curve = trained(tmp_path / "a", config)
    trained(tmp_path / "b", config.model_copy(update=dict(steps=4)))
    torch.manual_seed(99)                                                    # whatever the resumed process drew before
    cut, again = trained(tmp_path / "b", config, Denoiser(TOY))
    assert numbers(curve) == numbers(again)
    for a, b in zip(whole.state_dict().values(), cut.state_dict().values()): assert torch.equal(a, b)


def test_resume_falls_back_to_the_last_whole_checkpoint(tmp_path):
    config = TrainingConfig(steps=6, every=2, batch=2, warm=2)
    _, curve = trained(tmp_path, config)
    newest = newest_checkpoint(tmp_path)
    with open(newest / "model.safetensors", "r+b") as f: f.seek(200); f.write(b"x")
    assert not whole_checkpoint(newest) and newest_checkpoint(tmp_path).name == "step-00000004"
    with pytest.raises(TrainingError, match="differs from done.json"): load_generator(newest)
    _, again = trained(tmp_path, config)
    assert numbers(curve) == numbers(again)


def test_a_run_goes_on_only_as_what_it_was(tmp_path):
    trained(tmp_path, TrainingConfig(steps=2, every=2, batch=2))
    with pytest.raises(TrainingError, match="another lr"): trained(tmp_path, TrainingConfig(steps=4, every=2, batch=2, lr=.1))
    torch.manual_seed(0)
    with pytest.raises(TrainingError, match="another denoiser"): trained(tmp_path, TrainingConfig(steps=4, every=2, batch=2), Denoiser(TOY.model_copy(update=dict(padding="reflect"))))


def test_stages_move_what_they_should(tmp_path):
    for stage in ("pictures", "slices", "joint"):
        torch.manual_seed(0); net = Denoiser(TOY)
        torch.nn.init.normal_(net.unet.conv_out.weight, std=.1)              # silent outputs pass no gradient back on step one
        before = {k: v.clone() for k, v in net.state_dict().items()}
        trained(tmp_path / stage, TrainingConfig(steps=2, every=2, batch=2, stage=stage, ema=0., decay=0.), net)
        moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
        slices = {k for k in before if ".slice." in k}
        assert bool(moved & slices) == (stage != "pictures") and bool(moved - slices) == (stage != "slices"), stage
    flat = Denoiser(TOY.model_copy(update=dict(slices="none")))
    with pytest.raises(TrainingError, match="no slice convolutions"): trained(tmp_path / "flat", TrainingConfig(steps=1, stage="slices"), flat)


def test_slice_convolutions_are_free_of_weight_decay():
    net = Denoiser(TOY)
    rest, own = net.parameter_groups(.3)
    assert (rest["weight_decay"], own["weight_decay"]) == (.3, 0.)
    assert {id(p) for p in own["params"]} == {id(p) for s in net.slices for p in s.parameters()}
    assert len(rest["params"]) + len(own["params"]) == len(list(net.parameters()))


def test_scaling_is_measured_and_travels(tmp_path):
    x = torch.stack([c.ct for c in CASES])
    scaling = measure_scaling(CASES)
    z = scaling.enter(x)
    assert z.mean((0, 2, 3, 4)).abs().max() < 1e-4 and (z.var((0, 2, 3, 4), correction=0) - 1).abs().max() < 1e-3
    assert (scaling.leave(z) - x).abs().max() < 1e-4
    one = measure_scaling(CASES, "scalar")
    assert one.scale == pytest.approx(1 / x.std(correction=0).item(), rel=1e-4) and (one.mean, one.mask_mean, one.mask_scale) == (0., 0., one.scale)
    trained(tmp_path, TrainingConfig(steps=1, every=1, batch=2))
    assert load_generator(tmp_path).scaling == scaling


def test_examples_depend_on_seed_and_place_alone():
    config, s = TrainingConfig(batch=6, frames=3, dropout=.5), Scaling()
    one = training_batch(CASES, config, s, 4, 3)
    for world in (2, 3, 6):
        parts = [training_batch(CASES, config, s, 4, 3, r, world) for r in range(world)]
        for k in one: assert torch.equal(one[k], torch.cat([p[k] for p in parts]))
    assert one["z0"].shape == (6, 3, 3, 4, 4) and one["text"].shape == (6, 4, 8)
    assert not torch.equal(one["noise"], training_batch(CASES, config, s, 4, 4)["noise"])
    with pytest.raises(TrainingError, match="expected a multiple of 4"): training_batch(CASES, config, s, 4, 3, 0, 4)
    seen = [float(z) for step in range(7) for z in training_batch(CASES, TrainingConfig(batch=1, frames=0), s, 4, step)["z0"].sum((1, 2, 3, 4))]
    assert len(set(seen)) == 7                                               # an epoch shows every case once


def test_cases_of_unequal_length_need_a_crop(tmp_path):
    cases = [toy_case(0, 5), toy_case(1, 7)]
    with pytest.raises(TrainingError, match=r"^frames = 0: .*toy0 has \(3, 5, 4, 4\), toy1 has \(3, 7, 4, 4\).; set frames[^\n]*$"): training_batch(cases, TrainingConfig(batch=2), Scaling(), 4, 0)
    with pytest.raises(TrainingError, match="frames = 6"): training_batch(cases, TrainingConfig(batch=2, frames=6), Scaling(), 4, 0)
    many = [toy_case(n) for n in range(40)] + cases[1:]                                                  # they may meet after hours only: told at once
    with pytest.raises(TrainingError, match="toy1 has"): trained(tmp_path / "many", TrainingConfig(steps=1, batch=2), cases=many)
    assert not (tmp_path / "many").exists() and len(trained(tmp_path / "one", TrainingConfig(steps=1, batch=1), cases=many)[1]) == 1
    assert training_batch(cases, TrainingConfig(batch=2, frames=5), Scaling(), 4, 0)["z0"].shape[2] == 5
    assert len(training_batch(cases, TrainingConfig(batch=1), Scaling(), 4, 0)["z0"]) == 1


def test_channels_weigh_what_is_seen_of_them(tmp_path):
    assert channel_weights([1., 2.], 1).flatten().tolist() == pytest.approx([2/3, 4/3])
    assert channel_weights([1., 2.], 2).flatten().tolist() == pytest.approx([.4, 1.6])
    assert channel_weights([1., 2.], 0) is None
    with pytest.raises(TrainingError, match="hold no visibility"): channel_weights(None, 1)
    batch = training_batch(CASES, TrainingConfig(batch=2), Scaling(), 4, 0)
    loss = lambda weights: float(diffusion_loss(lambda z, *rest: torch.zeros_like(z), batch, TrainingConfig(batch=2), weights))
    by = (batch["noise"] - batch["z0"]).square().mean((0, 2, 3, 4))                                      # what flow asks for, against an answer of nothing
    assert loss(None) == pytest.approx(float(by.mean())) and loss(channel_weights([1., 2., 4.], 1)) == pytest.approx(float((by * torch.tensor([1., 2., 4.])).sum() / 7))
    config = TrainingConfig(steps=4, every=2, batch=2, visible=1.)
    _, curve = trained(tmp_path / "whole", config, facts=dict(visibility=[1., 2., 4.]))
    assert numbers(trained(tmp_path / "alike", config.model_copy(update=dict(visible=0.)))[1])[0]["loss"] != curve[0]["loss"]
    trained(tmp_path / "cut", config.model_copy(update=dict(steps=2)), facts=dict(visibility=[1., 2., 4.]))
    _, again = trained(tmp_path / "cut", config, facts=dict(visibility=[4., 2., 1.]))                    # a run goes on with what it began with
    assert numbers(again) == numbers(curve) and load_generator(tmp_path / "cut").config["visibility"] == [1., 2., 4.]


def test_a_damaged_or_foreign_generator_file_is_told(tmp_path):
    trained(tmp_path, TrainingConfig(steps=1, every=1, batch=2))
    path = pack_generator(load_generator(tmp_path), tmp_path / "g.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(WeightsError, match="g.safetensors: damaged"): load_generator(path)
    (tmp_path / "g.txt").write_text("no weights")
    with pytest.raises(WeightsError, match="g.txt: damaged or not a weights file"): load_generator(tmp_path / "g.txt")
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    path.write_bytes(whole)
    with safe_open(path, "pt") as f: head = f.metadata()
    state = load_file(path); lost = sorted(state)[0]
    save_file({k: v for k, v in state.items() if k != lost}, path, head)
    with pytest.raises(WeightsError, match=f"g.safetensors: not this network's weights .1 missing, first {lost}"): load_generator(path)
    save_file(state, path)
    with pytest.raises(TrainingError, match="not a generator of ours"): load_generator(path)


def test_dropout_hides_mask_and_text_together():
    config = TrainingConfig(batch=200, dropout=.3)
    b = training_batch(CASES, config, Scaling(), 4, 0)
    no_mask, no_text = (b["condition"] == 0).flatten(1).all(1), (b["text"] == 0).flatten(1).all(1)
    assert torch.equal(no_mask, no_text) and .2 < no_mask.float().mean() < .4


def test_mask_and_scan_are_cropped_and_moved_together():
    case = SimpleNamespace(ct=torch.arange(3*9*4*4.).reshape(3, 9, 4, 4), mask=torch.arange(3*9*4*4.).reshape(3, 9, 4, 4)[:2], text=torch.zeros(1, 8))
    config = TrainingConfig(batch=40, frames=4, shift=2, dropout=0.)
    b = training_batch([case], config, Scaling(), 1, 0)
    assert torch.equal(b["z0"][:, :2], b["condition"])
    assert len({float(z[0, 0, 0, 0]) for z in b["z0"]}) > 10
    rises = b["z0"][:, 0].diff(dim=-1)
    assert set(rises.unique().tolist()) == {0., 1.}                          # moved or repeated, never mirrored


def test_guidance_needs_a_model_asked_without_conditions(tmp_path):
    trained(tmp_path / "no", TrainingConfig(steps=1, every=1, batch=2, dropout=0.))
    z = torch.zeros(1, 3, 5, 4, 4)
    gen = load_generator(tmp_path / "no")
    gen.predict(z, torch.tensor(500.), guidance=1.)
    with pytest.raises(TrainingError, match="never asked without its conditions"): gen.predict(z, torch.tensor(500.), guidance=3.)


def test_packed_generator_is_half_the_size_and_nearly_the_same(tmp_path):
    torch.manual_seed(0); net = Denoiser(TOY)
    for p in net.parameters(): torch.nn.init.normal_(p, std=.1)
    trained(tmp_path, TrainingConfig(steps=1, every=1, batch=2), net)
    gen = load_generator(tmp_path)
    path = pack_generator(gen, tmp_path / "g.safetensors")
    assert path.stat().st_size < .7 * (newest_checkpoint(tmp_path) / "ema.safetensors").stat().st_size
    small = load_generator(path)
    assert small.scaling == gen.scaling and small.config["training"] == gen.config["training"] and "curve" not in small.config
    z, m, text = torch.randn(1, 3, 5, 4, 4), torch.randn(1, 2, 5, 4, 4), gen.enter_text(CASES[0].text)
    assert (small.predict(z, torch.tensor(300.), m, text) - gen.predict(z, torch.tensor(300.), m, text)).abs().max() < .02


def test_held_out_loss_is_the_same_each_time():
    torch.manual_seed(0); net = Denoiser(TOY).eval()
    a, b = (held_out_loss(net, CASES, TrainingConfig(seed=s), Scaling(), 4) for s in (0, 5))
    assert a == b and list(a) == [100, 300, 500, 700, 900]


def test_learning_beats_guessing(tmp_path):
    torch.manual_seed(0)
    _, curve = trained(tmp_path, TrainingConfig(steps=60, every=20, batch=4, lr=3e-3, warm=5, ema=.9))
    judged = [r["held"] for r in curve if "held" in r]
    assert judged[-1] < .9 * judged[0]


def test_bad_settings_are_told():
    for words, how in (("expected one of eps", dict(objective="x0")), ("made for flow", dict(objective="eps")), ("leave it at 0", dict(min_snr=5.)), ("expected one of uniform", dict(times="late"))):
        with pytest.raises(ValueError, match=words): TrainingConfig(**how)
    with pytest.raises(TrainingError, match="no whole checkpoint"): load_generator("nowhere")


def test_min_snr_and_v_train(tmp_path):
    for n, how in enumerate((dict(objective="v", times="uniform", min_snr=5.), dict(objective="eps", times="released", stage="slices"), dict(objective="eps", times="uniform", stage="pictures", checkpointing=True), dict(bf16=True))):
        _, curve = trained(tmp_path / str(n), TrainingConfig(steps=2, every=2, batch=2, **how))
        assert all(torch.isfinite(torch.tensor([r["loss"], r["held"]])).all() for r in curve)


SCRIPT = """
import sys; sys.path[:0] = {path!r}
import torch; torch.set_num_threads({threads})
from test_training import *
config = TrainingConfig(steps=40, every=2, batch=2, lr=1e-3, warm=2, ema=.9)
trained({folder!r}, config)
"""


def test_same_curve_after_a_kill(tmp_path):
    config = TrainingConfig(steps=40, every=2, batch=2, lr=1e-3, warm=2, ema=.9)
    script = SCRIPT.format(path=[os.path.dirname(__file__), *sys.path], folder=str(tmp_path / "killed"), threads=torch.get_num_threads())      # as many as here: see below
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.time() + 90
    while newest_checkpoint(tmp_path / "killed") is None and process.poll() is None and time.time() < until: time.sleep(.02)
    process.send_signal(signal.SIGKILL); process.wait()
    assert process.returncode == -signal.SIGKILL, process.stderr.read().decode()[-500:]
    assert 2 <= json.loads((newest_checkpoint(tmp_path / "killed") / "config.json").read_text())["step"] < 40
    _, again = trained(tmp_path / "killed", config)
    _, curve = trained(tmp_path / "whole", config)
    assert numbers(again) == numbers(curve)


THREADS = """
import sys; sys.path[:0] = {path!r}
import json, torch
from test_training import *
config = TrainingConfig(steps=4, every=2, batch=2, lr=1e-3, warm=2, ema=.9)
half = config.model_copy(update=dict(steps=2))
torch.set_num_threads(2)
_, whole = trained({folder!r} + "/whole", config)
trained({folder!r} + "/cut", half); _, cut = trained({folder!r} + "/cut", config)
torch.set_num_threads(1); trained({folder!r} + "/mixed", half)
torch.set_num_threads(2); _, mixed = trained({folder!r} + "/mixed", config)
print(json.dumps([numbers(c) for c in (whole, cut, mixed)]))
"""


def test_two_threads_resume_to_the_bit_and_another_number_to_rounding(tmp_path):
    "Threads share a sum among them, so their number fixes its order: with the same number the same bits, with another the same curve but for float32's last digits"
    script = THREADS.format(path=[os.path.dirname(__file__), *sys.path], folder=str(tmp_path))
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | dict(OMP_WAIT_POLICY="passive"))     # waiting threads leave the cores to others
    assert out.returncode == 0, out.stderr[-800:]
    whole, cut, mixed = json.loads(out.stdout.splitlines()[-1])
    assert cut == whole
    for a, b in zip(whole, mixed, strict=True): assert (b["loss"], b["held"]) == pytest.approx((a["loss"], a["held"]), rel=1e-6)
