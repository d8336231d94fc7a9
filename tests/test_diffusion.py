"Noise schedule, samplers and guidance against what the released sampler computes"
import json
import numpy as np
import pytest
import torch
from conftest import FIXTURES
from hypothesis import given, settings as hsettings, strategies as st
from fvae_nb.generation.diffusion import OBJECTIVES, DiffusionError, add_noise, clean, denoise, denoise_steps, draw_times, guide, make_scheduler, noise_schedule, released_timesteps, snr_weight, target

HERE = FIXTURES / "denoiser"
DDIM = json.loads((HERE / "ddim.json").read_text())


def test_schedule_buffers():
    want, have = np.load(HERE / "schedule.npz"), noise_schedule()
    for key in want.files:
        if key != "betas_float64": assert np.array_equal(have[key].numpy(), want[key].astype(np.float32)), key


def draw(seed, shape): return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def toy(x, t, c):
    "The fixture's denoiser, frames as a batch"
    a = noise_schedule()["alphas_cumprod"][t].reshape(-1, 1, 1, 1)
    return (1 - a).sqrt() * x / (1 - .75 * a) + .05 * torch.sin(3 * x) + .1 * c


@pytest.mark.parametrize("name", sorted(DDIM["cases"]))
def test_every_ddim_step(name):
    case, want = DDIM["cases"][name], np.load(HERE / "ddim.npz")
    shape, steps = tuple(DDIM["input"]["shape"]), case["steps"]
    x_T, cond, uncond = (draw(n, shape) for n in (1, 2, 3))
    noise = draw(case["noise_seed"], (steps, *shape))
    abar, seen, model = noise_schedule()["alphas_cumprod"], [], lambda z, t, c, text: toy(z, t, c)
    previous, fresh = draw(4, (1, 1, *shape[1:])), draw(case["noise_seed"] + 1, (steps + 1, 1, 1, *shape[1:]))
    put = lambda z, a, n: torch.cat([a.sqrt() * previous[0] + (1 - a).sqrt() * fresh[n, 0], z[1:]])
    def after(z, step):
        seen.append(z)
        return put(z, abar[steps - 1 - step], step + 1) if case["chained"] else z          # the release counts its index down: kept for parity
    z = put(x_T, abar[999], 0) if case["chained"] else x_T
    def predict(z, t):
        if case["guidance_scale"] == 1: return guide(model, z, t, cond, None)
        c = torch.cat([uncond, cond])                                                       # the fixture's unconditional input is not zero
        return guide(lambda z, t, _, text: toy(z, t, c), z, t, cond, None, case["guidance_scale"])
    out, believed = [], []
    for z, x0 in denoise_steps(predict, z, make_scheduler("eps", "ddim", steps), case["eta"], lambda i: noise[i], after): out.append(z); believed.append(x0)
    for have, key in ((torch.stack(seen), "x"), (torch.stack(believed), "pred_x0"), (out[-1], "output")):
        assert np.abs(have.numpy() - want[f"{name}.{key}"]).max() < 2e-5, key


@pytest.mark.parametrize("steps", sorted(map(int, DDIM["spacing"])))
def test_released_timesteps(steps):
    facts, abar = DDIM["spacing"][str(steps)], noise_schedule()["alphas_cumprod"]
    assert released_timesteps(steps) == facts["timesteps"] and len(facts["timesteps"]) == facts["count"]
    scheduler = make_scheduler("eps", "ddim", steps, released=True)
    assert scheduler.timesteps.tolist() == facts["timesteps"][::-1]
    z = torch.ones(1, 1, 1, 1, 1)
    for n in (0, 1, len(facts["timesteps"]) - 1):                                            # one exact step with eta 1 and no signal shows a_prev and sigma
        t = facts["timesteps"][n]
        step = scheduler.step(torch.zeros_like(z), t, z, eta=1., variance_noise=torch.zeros_like(z)).prev_sample
        assert step.item() == pytest.approx((facts["alphas_prev"][n] / facts["alphas"][n])**.5, rel=1e-5)
        assert abar[t].item() == pytest.approx(facts["alphas"][n], rel=1e-6)


@hsettings(max_examples=40, deadline=None)
@given(st.sampled_from(OBJECTIVES), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**31 - 1), st.booleans())
def test_answers_give_the_latent_back(objective, batch, frames, seed, per_frame):
    g = torch.Generator().manual_seed(seed)
    z0, noise = (torch.randn(batch, 2, frames, 3, 3, generator=g) for _ in range(2))
    t = draw_times((batch, frames) if per_frame else (batch,), objective, "uniform", g)
    z = add_noise(z0, noise, t, objective)
    assert z.shape == z0.shape
    assert (clean(target(z0, noise, t, objective), z, t, objective) - z0).abs().max() < 1e-4


@pytest.mark.parametrize("objective, sampler", [("eps", "ddim"), ("v", "ddim"), ("eps", "dpm"), ("v", "dpm"), ("eps", "unipc"), ("v", "unipc"), ("flow", "flow"), ("flow", "dpm"), ("flow", "unipc")])
def test_an_exact_network_leads_every_sampler_to_the_data(objective, sampler):
    "Data: Gaussian with mean 2 and deviation 0.1, narrow as tissue is; its best answer is known, so 50 steps must give that mean and deviation"
    from fvae_nb.generation.diffusion import amplitudes
    def predict(z, t):
        a, s = amplitudes(t.reshape(1), objective)
        x0 = 2 + .01 * a * (z - 2 * a) / (.01 * a**2 + s**2)
        eps = (z - a * x0) / s.clamp(min=1e-6)
        return {"eps": eps, "v": a * eps - s * x0, "flow": eps - x0}[objective]
    noise = torch.randn(1, 8, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    scheduler = make_scheduler(objective, sampler, 50)
    a, s = (float(x) for x in amplitudes(scheduler.timesteps[:1], objective))
    out = denoise(predict, 2 * a + (.01 * a**2 + s**2)**.5 * noise, scheduler)             # started where the data truly are at the first timestep
    assert out.mean().item() == pytest.approx(2, abs=.02)
    assert out.std().item() == pytest.approx(.1, rel=.15)


def test_pure_noise_at_the_first_timestep_costs_a_bias():
    "The paper's road still holds some signal at its end; samplers start without it, so means drift towards 0"
    def predict(z, t):
        a = noise_schedule()["alphas_cumprod"][t]
        x0 = 2 + .25 * a.sqrt() * (z - 2 * a.sqrt()) / (.25 * a + 1 - a)
        return (z - a.sqrt() * x0) / (1 - a).sqrt()
    out = denoise(predict, torch.randn(1, 8, 8, 16, 16, generator=torch.Generator().manual_seed(0)), make_scheduler("eps", "ddim", 50))
    assert 1.85 < out.mean().item() < 1.97


def test_min_snr_holds_easy_steps_down():
    a = noise_schedule()["alphas_cumprod"].double()
    snr = a / (1 - a)
    t = torch.arange(1000)
    assert torch.allclose(snr_weight(t, "eps").flatten().double(), snr.clamp(max=5) / snr, rtol=1e-4)
    assert torch.allclose(snr_weight(t, "v").flatten().double(), snr.clamp(max=5) / (snr + 1), rtol=1e-4)


def test_bad_input_is_told():
    for call, words in ((lambda: draw_times((1,), "noise"), "objective = 'noise'"), (lambda: draw_times((1,), "eps", "late"), "times = 'late'"), (lambda: make_scheduler("eps", "flow"), "sampler = 'flow'"),
                        (lambda: make_scheduler("flow", "ddim"), "sampler = 'ddim'"), (lambda: make_scheduler("eps", "ddim", 0), "steps = 0"), (lambda: snr_weight(torch.tensor([1.]), "flow"), "min_snr"),
                        (lambda: denoise(lambda z, t: z, torch.zeros(1, 1, 1, 2, 2), make_scheduler("flow", "flow", 2), eta=1.), "eta = 1"), (lambda: denoise(lambda z, t: z, torch.zeros(1, 1, 1, 2, 2), make_scheduler("eps", "ddim", 2), eta=1.), "source of noise")):
        with pytest.raises(DiffusionError, match=words): call()
