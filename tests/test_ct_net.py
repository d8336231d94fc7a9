"CT-Net: the released keys and shapes, the public code's numbers part by part, its preparation, its checkpoint's wrapping."
import json
import numpy as np
import pytest
import torch
from conftest import FIXTURES
from rules import fill, smooth_video
from test_features import agree, close, synthetic, volume
from fvae_nb.data.ct import DataError
from fvae_nb.evaluation.ct_net import CTNet, net_frame, net_input, read_ct_net, squeezed
from fvae_nb.evaluation.features import load_extractor
from fvae_nb.vaes.interface import WeightsError

FOLDER = FIXTURES / "ct_net"


@pytest.fixture(scope="module")
def net():
    n = CTNet().eval(); fill(n); return n.requires_grad_(False)


def test_released_keys_and_shapes():
    want = json.loads((FOLDER / "keys.json").read_text())
    assert {k: list(v.shape) for k, v in CTNet().state_dict().items()} == {k: v["shape"] if isinstance(v, dict) else v for k, v in want.items()}


def test_backbone_and_head_as_stored(net):
    close(net.features(torch.stack([torch.from_numpy(smooth_video(3, 1, 96, 80, s)[:, 0]) for s in (0, 1)])).numpy(), np.load(FOLDER / "backbone.npz")["features"])
    s = np.load(FOLDER / "head.npz"); y = torch.from_numpy(np.abs(np.random.RandomState(5).standard_normal((1, 134, 512, 14, 14))).astype(np.float32))
    r = net.reducingconvs(y); close(r.numpy(), s["reduced"])
    close(net.classifier[0](r.flatten(1)).numpy(), s["fc128"]); close(net.classifier[:4](r.flatten(1)).numpy(), s["fc96"])
    f = net.pooled(y); close(f.numpy(), s["feature"]); close(net.classifier[5:](f).numpy(), s["logits"])


@pytest.mark.slow
def test_whole_volume_as_stored(net):
    z, y, x = (np.arange(n, dtype=np.float32) for n in (402, 420, 420))
    v = .5*np.sin(.05*z[:, None, None] + .03*y[:, None])*np.cos(.04*x) + .05*np.sin(.9*z)[:, None, None]
    close(net.feature(torch.from_numpy(v.astype(np.float32))[None]).numpy(), np.load(FOLDER / "full_forward.npz")["feature"], 1e-3)


def test_preparations_as_stored():
    ct = synthetic()
    agree(squeezed(ct), "toolkit_fvd_unit", hu=False)
    agree(net_input(ct, "vlm3d"), "toolkit_ctnet_input", hu=False)
    agree(net_frame(np.random.RandomState(5).randint(-1200, 900, (101, 200, 200)).astype(np.float32)), "ctnet_prepare_small", hu=False)
    agree(net_frame(np.random.RandomState(4).randint(-1200, 900, (405, 419, 431)).astype(np.float32)), "ctnet_prepare_odd", hu=False)
    agree(net_input(ct), "ctnet_nii_input", hu=False)


def test_preparations_mean_different_things():
    long, short = volume(0, (60, 200, 200)), volume(0, (30, 200, 200))
    empty = lambda ct, v: (lambda a: float((a.reshape(402, -1).max(1) == a.reshape(402, -1).min(1)).mean()))(net_input(ct, v)[:, ::20, ::20])
    assert empty(short, "clean") > empty(long, "clean") > .5 and empty(short, "vlm3d") == 0
    with pytest.raises(DataError, match="expected clean or vlm3d"): net_input(short, "fvd")


def test_checkpoint_is_unwrapped_and_strict(tmp_path, net):
    file = tmp_path / "CTNet28_ctclip_whole_data_18classes"
    torch.save({"params": {"module." + k: v for k, v in net.state_dict().items()}, "optimizer": {"state": {}, "param_groups": []}}, file)
    again, digest = read_ct_net(file)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in again.state_dict().items()) and len(digest) == 64
    assert load_extractor("ct-net", weights=tmp_path).name == "CT-Net" and load_extractor("ct-net", weights=file, variant="vlm3d").name == "CT-Net (vlm3d)"
    data = file.read_bytes(); file.write_bytes(data[:840_000])                          # as the copy in the public repository
    with pytest.raises(WeightsError, match="cut short"): read_ct_net(file)
    torch.save({"params": {"module.features.0.weight": torch.zeros(64, 3, 7, 7)}}, file)
    with pytest.raises(WeightsError, match="missing"): read_ct_net(file)


def test_another_number_of_findings(tmp_path):
    torch.save(CTNet(83).state_dict(), tmp_path / "original.pt")
    assert len(read_ct_net(tmp_path / "original.pt")[0].classifier[6].bias) == 83
    with pytest.raises(WeightsError, match="of another shape"): read_ct_net(tmp_path / "original.pt", 18)
