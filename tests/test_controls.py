"Plain denoisers at a VAE's distance: attained, said when not attainable, in millimetres."
import numpy as np
import pytest
from fvae_nb.data.ct import ct_volume
from fvae_nb.data.samples import ellipsoid_thorax
from fvae_nb.data.prepare import crop
from fvae_nb.metrics.image import mse
from fvae_nb.reconstruction.controls import DENOISERS, Operators, control_names, denoise, match_denoiser, matched_to
from fvae_nb.vaes.interface import load_vae


@pytest.fixture(scope="module")
def thorax(): return crop(ellipsoid_thorax(), slices=slice(25, 38), rows=slice(20, 108), columns=slice(10, 118))


@pytest.mark.parametrize("kind", DENOISERS)
@pytest.mark.parametrize("name", ["tiny", "dct-4x8x8-16-causal"])
def test_attains_the_mse_of_the_vae(thorax, kind, name):
    operate = Operators()
    back, _ = operate(thorax, name)
    match = match_denoiser(thorax, back, kind)
    target = mse(thorax.array, back.array)
    assert match.matched and match.target == target
    assert match.mse == pytest.approx(target, rel=.01) and mse(thorax.array, match.volume.array) == match.mse   # what is said is what is there


@pytest.mark.parametrize("kind", DENOISERS)
def test_more_strength_is_more_distance(thorax, kind):
    errors = [mse(thorax.array, denoise(thorax, kind, s).array) for s in ((.5, 1, 2, 4) if kind == "gaussian" else (5, 20, 80, 320))]
    assert errors == sorted(errors) and errors[0] > 0


@pytest.mark.parametrize("kind", DENOISERS)
def test_out_of_reach_is_said(thorax, kind):
    match = match_denoiser(thorax, thorax.with_array(-thorax.array), kind)
    assert not match.matched and not match.facts["matched"] and match.mse < .99*match.target


def test_a_perfect_vae_needs_no_filter(thorax):
    match = match_denoiser(thorax, thorax, "gaussian")
    assert (match.strength, match.mse, match.matched) == (0., 0., True)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (5, 1, 1), (2, .7, .7)])
def test_gaussian_is_as_wide_in_millimetres_along_every_axis(spacing):
    "Second moment of a blurred point: sigma squared, whatever the voxel"
    x = np.full((61, 61, 61), -1000, np.float32); x[30, 30, 30] = 1000
    y = denoise(ct_volume(x, spacing), "gaussian", 3.).array.astype(float) + 1000
    for axis, mm in enumerate(spacing):
        line = y.sum(tuple(a for a in range(3) if a != axis)); at = (np.arange(61) - 30) * mm
        # a Gaussian much narrower than a voxel is sampled, so sigma of 3 mm at 5 mm voxels is not exact
        assert np.sqrt((line * at**2).sum() / line.sum()) == pytest.approx(3., rel=.02 if mm < 3 else .25)


def test_what_lies_outside_the_window_is_clipped_first():
    x = np.zeros((3, 16, 16), np.float32); x[:, 8, 8] = 3000
    assert denoise(ct_volume(x), "gaussian", 1.).array.max() < denoise(ct_volume(np.clip(x, None, 1000)), "gaussian", 1.).array.max() + 1e-3


def test_names(thorax):
    spec = load_vae("tiny").spec
    assert control_names("tiny", spec, ("gaussian", "nlm")) == ["dct-4x8x8-16-causal", "gaussian-as-tiny", "nlm-as-tiny"]
    assert control_names("dct", spec) == control_names("real", spec) == []
    assert matched_to("tv-as-dct-4x8x8-16-causal") == ("tv", "dct-4x8x8-16-causal") and matched_to("median-as-tiny") is None
    with pytest.raises(ValueError, match="gaussian, tv, nlm"): control_names("tiny", spec, ("median",))
    with pytest.raises(ValueError, match="did you mean 'tiny'"): Operators()(thorax, "gaussian-as-tini")


def test_reconstructs_once_for_all_controls_of_a_case(thorax):
    calls = []
    class Counting:
        def __init__(self): self.net = load_vae("dct")
        def __getattr__(self, name):
            if name == "encode_stream": calls.append(1)
            return getattr(self.net, name)
    operate = Operators(load=lambda name: Counting())
    for name in ("tiny", "gaussian-as-tiny", "tv-as-tiny"): operate(thorax, name)
    assert len(calls) == 1
    operate(thorax.with_array(thorax.array), "tiny")                 # another volume, even with equal values
    assert len(calls) == 2


@pytest.mark.parametrize("strength", [-1, float("nan"), float("inf")])
def test_bad_strength(thorax, strength):
    with pytest.raises(ValueError, match="strength"): denoise(thorax, "gaussian", strength)


def test_other_grid(thorax):
    with pytest.raises(ValueError, match="one grid"): match_denoiser(thorax, crop(thorax, slices=slice(0, 5)), "gaussian")
