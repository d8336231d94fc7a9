"T(x) = D(E(x)) of whole scans."
import json, subprocess, sys
import nibabel as nib
import numpy as np
import pytest
from conftest import FIXTURES
from fvae_nb.data.ct import ct_volume, read_ct
from fvae_nb.metrics.image import mse, psnr
from fvae_nb.reconstruction.operator import reconstruct
from fvae_nb.vaes.interface import load_vae


def test_papers_protocol_to_the_letter(taef2, tmp_path):
    from rules import smooth_video
    facts, data = json.loads((FIXTURES / "taef2/protocol_taef2.json").read_text()), np.load(FIXTURES / "taef2/protocol_taef2.npz")
    hu = np.transpose(np.round(1200 * smooth_video(1, 70, 32, 40, seed=9)[0]).astype(np.int16), (1, 2, 0))
    nib.save(nib.Nifti1Image(hu, np.diag([.7, .7, 2.5, 1.])), tmp_path / "a.nii.gz")
    from fvae_nb.data.ct import write_ct
    write_ct(reconstruct(read_ct(tmp_path / "a.nii.gz"), taef2, protocol="paper"), tmp_path / "b.nii.gz", "int16")
    ours, theirs = nib.load(tmp_path / "b.nii.gz").get_fdata(), data["recon_hu"]
    different = ours != theirs
    print("voxels that differ: %.4f %%, by at most %g HU" % (100 * different.mean(), np.abs(ours - theirs).max()))
    assert np.abs(ours - theirs).max() <= 1 and different.mean() <= 1e-3
    clip = lambda x: np.transpose(x, (2, 0, 1)).astype(np.float32)
    assert abs(psnr(clip(hu), clip(theirs)) - facts["metrics_by_the_proposed_definition"]["psnr_volume"]) < 1e-3
    assert abs(mse(clip(hu), clip(theirs)) - facts["metrics_by_the_proposed_definition"]["mse255"]) < 1e-2


_MEMORY = """
import sys, numpy as np, torch
torch.set_num_threads(1)
from fvae_nb.data.ct import ct_volume
from fvae_nb.reconstruction.operator import reconstruct
from fvae_nb.vaes.interface import load_vae
vae, n = load_vae('tiny'), int(sys.argv[1])
reconstruct(ct_volume(np.zeros((5, 256, 256), np.float32) + np.arange(256, dtype=np.float32)), vae)
ct = ct_volume(np.random.default_rng(0).normal(0, 300, (n, 256, 256)).astype(np.float32))
reconstruct(ct, vae)
peak = next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))     # ru_maxrss would remember the parent's
print(peak * 1024 - 2 * ct.array.nbytes)
"""


@pytest.mark.slow
def test_memory_is_flat_in_slices():
    def peak(n): return int(subprocess.run([sys.executable, "-c", _MEMORY, str(n)], capture_output=True, text=True, check=True).stdout) / 2**20
    peaks = [min(peak(n) for _ in range(2)) for n in (65, 129, 257)]           # the lesser of two: the allocator's accidents add, never subtract
    print("peak memory above input and output arrays, MB:", [round(p, 1) for p in peaks])
    assert max(peaks) / min(peaks) < 1.05


@pytest.mark.parametrize("file, dct, dct32", [("LUNG1-001_ct", 31.93, 41.7)])
def test_control_reproduces_the_measured_figures(test_data, file, dct, dct32):
    ct = read_ct(test_data / "ct" / f"{file}.nii.gz")
    assert abs(psnr(ct.array, reconstruct(ct, load_vae("dct")).array) - dct) < .1
    assert abs(psnr(ct.array, reconstruct(ct, load_vae("dct-1x8x8-32")).array) - dct32) < .1


@pytest.mark.parametrize("file, slices", [("LUNG1-001_ct", slice(40, 81)), ("crlm_1004_ct", slice(0, 41)), ("STS_003_ct", slice(4, 45))])
def test_tiny_beats_its_control_on_scans_it_never_saw(test_data, file, slices):
    from fvae_nb.data.prepare import crop
    ct = crop(read_ct(test_data / "ct" / f"{file}.nii.gz"), slices=slices)
    gain = psnr(ct.array, reconstruct(ct, load_vae("tiny")).array) - psnr(ct.array, reconstruct(ct, load_vae("dct-4x8x8-16-causal")).array)
    print(f"{file}: {gain:+.2f} dB over the causal control")
    assert gain >= 1.5


_LITTLE = """
import sys, numpy as np, torch
torch.set_num_threads(1)
from fvae_nb.data.ct import ct_volume
from fvae_nb.reconstruction import operator
from fvae_nb.vaes.interface import load_vae
def held(what): return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(what)) * 1024
vae, free = load_vae('tiny'), int(sys.argv[1])
operator.free_memory = lambda device='cpu': free
ct = ct_volume(np.random.default_rng(0).normal(0, 300, (49, 256, 256)).astype(np.float32))
operator.reconstruct(ct_volume(ct.array[:5, :64, :64]), vae)
before = held('VmRSS')
open('/proc/self/clear_refs', 'w').write('5')                                  # the peak starts anew
out = operator.reconstruct(ct, vae)
print(held('VmHWM') - before - out.array.nbytes, operator.chunk_for(vae, ct.shape), float(np.abs(out.array - operator.reconstruct(ct, vae, chunk=16).array).max()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("free, chunk", [(40, 4), (70, 8), (130, 16)])
def test_a_step_is_chosen_that_fits(free, chunk):
    "Told of little free memory, the operator takes smaller steps, stays under the limit and gives the same scan"
    made = subprocess.run([sys.executable, "-c", _LITTLE, str(free * 10**6)], capture_output=True, text=True, check=True).stdout.split()
    print(f"{free} MB free: {made[1]} slices a step, {int(made[0]) / 1e6:.0f} MB taken, at most {float(made[2]):.1g} HU apart")
    assert int(made[1]) == chunk and int(made[0]) < free * 10**6 and float(made[2]) < 2e-2


def test_free_memory_is_the_lesser_of_machine_and_container(monkeypatch):
    from pathlib import Path
    from fvae_nb.reconstruction import operator
    files = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n"}
    def read(self, *args, **kwargs):
        if str(self) not in files: raise FileNotFoundError(self)
        return files[str(self)]
    monkeypatch.setattr(Path, "read_text", read)
    assert operator.free_memory() == 4000 * 1024
    files |= {"/sys/fs/cgroup/memory.max": "3000000\n", "/sys/fs/cgroup/memory.current": "1000000\n"}
    assert operator.free_memory() == 2000000
    files["/sys/fs/cgroup/memory.max"] = "max\n"                              # no limit set
    assert operator.free_memory() == 4000 * 1024
    files.clear()
    assert operator.free_memory() is None and operator.chunk_for(load_vae("tiny"), (9, 512, 512)) == 16


def test_jobs_may_choose_the_step(in_tmp):
    "chunk=null: a step that fits; the numbers stay"
    from fvae_nb import read_ct, write_ct
    from fvae_nb.data.phantom import thorax_phantom
    from fvae_nb.jobs import reconstruct as job
    from fvae_nb.running.jobs import make_params
    write_ct(thorax_phantom((21, 48, 48), (6., 7., 7.), noise=False).ct, in_tmp / "c.nii.gz")
    runs = [job.run(make_params("reconstruct", ["cases=c.nii.gz", "vae=tiny", "control=false", "device=cpu", f"chunk={c}", f"run=r{c}"])) for c in ("null", "16", "3")]
    a, *others = (read_ct(next((r.folder / "volumes/tiny").glob("*.nii.gz"))).array for r in runs)
    assert all(np.abs(a - b).max() <= 1 for b in others) and runs[0].params["chunk"] is None


def test_encode_may_choose_its_step(in_tmp, monkeypatch):
    from fvae_nb.generation.latents import read_latents
    from fvae_nb.jobs import encode as job
    from fvae_nb.running.jobs import make_params
    asked = []
    from fvae_nb.reconstruction import operator
    monkeypatch.setattr(operator, "chunk_for", lambda vae, shape: asked.append(shape) or 4)
    given = ["vae=tiny", "phantoms=1", "phantom_shape=13,32,32", "text=none", "device=cpu", "dtype=float32"]
    a, b = (read_latents(next((job.run(make_params("encode", [*given, f"chunk={c}", f"run=e{c}"])).folder).rglob("*.safetensors"))) for c in ("null", "16"))
    assert asked == [(13, 32, 32)] and float((a.ct - b.ct).abs().max()) < 1e-4 and float((a.mask - b.mask).abs().max()) < 1e-4
