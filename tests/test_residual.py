"The residual taken apart: planted noise, structure, texture, spectra, blurs and shifts come back as planted."
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from fvae_nb.data.ct import ct_volume
from fvae_nb.reconstruction.controls import denoise
from fvae_nb.reconstruction.residual import ball, by_distance, by_tissue, edge_response, noise_power, split_error, tissue_classes, transfer, true_noise_kept


@pytest.fixture(scope="module")
def parts():
    rng = np.random.default_rng(0); shape = (9, 64, 64)
    clean = np.zeros(shape) + 40; clean[:, 20:40, 20:40] = 90
    return clean, rng.normal(0, 12, shape), rng.normal(0, 5, shape)


@pytest.mark.parametrize("kept", [0., .3, 1.])
def test_planted_parts_are_found(parts, kept):
    "T keeps a share of the noise, loses half of the square, and makes texture of its own"
    clean, noise, texture = parts
    lost = np.where(clean > 50, -25, 0)
    found = split_error(clean + noise, clean, clean + lost + kept*noise + texture, clean + lost)
    assert found["kept"] == pytest.approx(kept, abs=.02) and found["lost"] == pytest.approx(np.sqrt((lost**2).mean())) and found["texture"] == pytest.approx(5, rel=.02)
    total = ((lost + (kept - 1)*noise + texture)**2).mean()
    assert found["structure"] == pytest.approx((lost**2).mean()/total) and found["removed"] == pytest.approx((1 - kept)**2*144/total, rel=.05, abs=.002)
    assert found["structure"] + found["removed"] + found["made"] + found["cross"] == pytest.approx(1) and abs(found["cross"]) < .05
    assert found["rms"] == pytest.approx(np.sqrt(total)) and found["noise"] == pytest.approx(12, rel=.02)


def test_only_the_region_asked_for_counts(parts):
    clean, noise, _ = parts
    where = np.zeros(clean.shape, bool); where[:, :10] = True
    back = clean + .5*noise; back[:, 20:] += 300
    found = split_error(clean + noise, clean, back, clean, where)
    assert found["kept"] == pytest.approx(.5) and found["made"] < 1e-9


def test_identity_and_perfect_denoiser(parts):
    clean, noise, _ = parts
    same = split_error(clean + noise, clean, clean + noise, clean)
    assert same["kept"] == pytest.approx(1) and same["rms"] == pytest.approx(0, abs=1e-9)
    best = split_error(clean + noise, clean, clean, clean)
    assert best["removed"] == pytest.approx(1) and best["to_truth"] == 0 and best["kept"] == 0


@pytest.mark.parametrize("spacing", [(3., 1., 1.), (2., .7, .7)])
def test_power_spectrum_adds_up_to_the_variance_and_white_is_flat(spacing):
    x = np.random.default_rng(1).normal(0, 10, (12, 96, 96))
    f, power, n = noise_power(x, np.ones(x.shape, bool), spacing, 16)
    assert n == 12*11*11 and f[0] > 0 and f[-1] <= np.hypot(.5, .5)/spacing[1]
    assert power.mean() == pytest.approx(100*spacing[1]*spacing[2], rel=.03) and power.std()/power.mean() < .05


def test_spectrum_of_blurred_noise_falls_as_the_filter_says():
    x = np.random.default_rng(2).normal(0, 10, (30, 128, 128)); sigma = 1.2
    y = gaussian_filter(x, (0, sigma, sigma))
    f, a, _ = noise_power(x, np.ones(x.shape, bool), (1, 1, 1), 32); _, b, _ = noise_power(y, np.ones(x.shape, bool), (1, 1, 1), 32)
    low = (f > .05) & (f < .25)
    assert np.allclose(b[low]/a[low], np.exp(-4*np.pi**2*sigma**2*f[low]**2), rtol=.2, atol=.01)


def test_squares_lie_inside_the_region():
    x = np.zeros((2, 40, 40)); where = np.zeros(x.shape, bool); where[:, 8:32, 8:32] = True
    x[~where] = 1e4                                            # would drown everything
    assert noise_power(x, where, (1, 1, 1), 16)[1].max() == 0
    with pytest.raises(ValueError, match="no square of 16 pixels"): noise_power(x, where & False, (1, 1, 1), 16)


def test_edge_of_a_ball_is_where_it_is():
    ct, distance, cosine = ball(noise=0.)
    for where in (cosine < .35, cosine > .85):
        e = edge_response(ct.array, distance, where)
        assert abs(e["shift_mm"]) < .05 and e["high"] == pytest.approx(50, abs=2) and e["low"] == pytest.approx(-850, abs=2)


@pytest.mark.parametrize("grow", [-1.5, -.5, .7, 2.])
def test_a_planted_shift_of_the_border_comes_back_in_millimetres_with_its_sign(grow):
    ct, distance, cosine = ball(noise=0.)
    moved, _, _ = ball(noise=0., radius_mm=22. + grow)
    assert edge_response(moved.array, distance, cosine < .35)["shift_mm"] == pytest.approx(grow, abs=.06)


@pytest.mark.parametrize("sigma", [1.5, 2.5])
def test_blur_gives_the_width_and_the_mtf_of_its_gaussian(sigma):
    ct, distance, cosine = ball(noise=0., spacing=(1., 1., 1.), shape=(65, 96, 96))
    e = edge_response(denoise(ct, "gaussian", sigma).array, distance, cosine < .5, reach_mm=10.)
    assert e["width_mm"] == pytest.approx(np.hypot(2.563*sigma, .9), rel=.08)
    f, m = transfer(e)
    g = transfer(edge_response(ct.array, distance, cosine < .5, reach_mm=10.))[1]
    low = (f > .02) & (f < .12)
    assert np.allclose((m/g)[low], np.exp(-2*np.pi**2*sigma**2*f[low]**2), atol=.02)


def test_noise_hardly_moves_the_edge():
    e = [edge_response(v.array, d, c < .35)["shift_mm"] for v, d, c in (ball(100., 40., noise=10., seed=s) for s in range(3))]
    assert max(map(abs, e)) < .15


def test_bins_without_voxels_are_told():
    ct, distance, cosine = ball()
    with pytest.raises(ValueError, match="no voxel at"): edge_response(ct.array, distance, cosine < -1)


def test_an_edge_that_is_gone_has_no_width():
    ct, distance, cosine = ball()
    flat = edge_response(np.zeros(ct.shape), distance, cosine < .35)
    assert np.isnan(flat["shift_mm"]) and np.isnan(flat["width_mm"])


def test_tissue_and_distance_find_where_the_error_was_put():
    ct, distance, _ = ball(noise=0., background=-850., inside=50.)
    at_edge = ct.with_array(ct.array + np.where(np.abs(distance) < 1, 60, 0).astype(np.float32))
    found = by_tissue(ct.array, at_edge.array)
    assert found["edge"]["error"] > .99 and found["flat"]["error"] < .01 and found["edge"]["bias"] > 5
    rows = by_distance(ct, at_edge, ct.with_array((distance < 0).astype(np.uint8)))
    assert rows[0]["rms"] > 10*max(r["rms"] for r in rows if r["from"] >= 3) and rows[0]["from"] == 0
    assert set(tissue_classes(ct.array)) == {"edge", "flat", "bone", "lung"}


def test_kept_noise():
    rng = np.random.default_rng(0); clean = np.zeros((3, 40, 40)); n = rng.normal(0, 9, clean.shape)
    found = true_noise_kept(clean + n, clean, clean + .4*n + rng.normal(0, 3, n.shape), np.ones(n.shape, bool))
    assert found["kept"] == pytest.approx(.4, abs=.02) and found["correlation"] == pytest.approx(3.6/np.hypot(3.6, 3), abs=.02)
