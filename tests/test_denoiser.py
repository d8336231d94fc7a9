"The denoiser against what the released network computes, key for key and number for number"
import json
import numpy as np
import pytest
import torch
from conftest import FIXTURES
from rules import rule_array, smooth_video
from fvae_nb.generation.denoiser import Denoiser, DenoiserConfig, DenoiserError, from_released, released_keys, sized, to_released

HERE = FIXTURES / "denoiser"
CASES = json.loads((HERE / "cases.json").read_text())


def config_of(case):
    c = case["config"]
    levels = range(len(c["channel_mult"]))
    return DenoiserConfig(latent=c["out_channels"], condition=c["in_channels"] - c["out_channels"], text=c["context_dim"], channels=[c["model_channels"] * m for m in c["channel_mult"]], blocks=c["num_res_blocks"],
                          attention=[2**l in c["attention_resolutions"] for l in levels], head=c["num_head_channels"], slices="none" if case["kind"] == "2d" else "dense", padding=case["padding_of_slice_convs"] or "zeros")


def released_state(case, config):
    keys = {k: tuple(v.shape) for k, v in to_released(Denoiser(config)).items()}
    dirac = "Dirac" in case["weights"]
    return {k: torch.from_numpy(rule_array(k, s)) for k, s in keys.items() if not (dirac and "temporal_conv" in k)}


def inputs(case):
    c, i = case["config"], case["input"]
    size, n = (i["frames"], i["height"], i["width"]), range(i["volumes"])
    z = [np.random.RandomState(100 + i["seed"] + b).standard_normal((c["out_channels"], *size)) for b in n]
    m = [smooth_video(c["in_channels"] - c["out_channels"], *size, seed=200 + i["seed"] + b) for b in n]
    text = [np.random.RandomState(300 + i["seed"] + b).standard_normal((i["context_tokens"], c["context_dim"])) for b in n]
    return [torch.from_numpy(np.stack(x).astype(np.float32)) for x in (z, m, text)] + [torch.tensor(i["timesteps"])]


@pytest.mark.parametrize("name", sorted(CASES))
def test_numbers_of_the_released_network(name):
    case = CASES[name]
    config = config_of(case)
    net = from_released(released_state(case, config), config)
    z, m, text, t = inputs(case)
    want, seen = np.load(HERE / f"{name}.npz"), {}
    names = {k.rsplit(".", 1)[0]: v.rsplit(".", 1)[0] for k, v in released_keys(net).items()}
    net.unet.time_embedding.register_forward_hook(lambda m, i, o: seen.update(time_embed=o[::z.shape[2]]))
    net.unet.time_proj.register_forward_hook(lambda m, i, o: seen.update(timestep_embedding=o[::z.shape[2]]))
    net.unet.conv_in.register_forward_hook(lambda m, i, o: seen.update({"input_blocks.0": o[:3]}))
    net.unet.down_blocks[0].resnets[0].register_forward_hook(lambda m, i, o: seen.update({"input_blocks.1": o[:3]}))
    net.unet.mid_block.register_forward_hook(lambda m, i, o: seen.update(middle_block=o[:3]))
    with torch.no_grad(): y = net(z, t, m, text)
    depth = len(config.channels) - 1
    seen["output"] = y.transpose(1, 2).flatten(0, 1)
    assert set(seen) <= set(want.files) and len(seen) == 6
    for key, value in seen.items():                                   # the answer to 2e-5; inner maps, up to 15 in size, to 2e-5 of their unit
        assert np.abs(value.numpy() - want[key]).max() < 2e-5 * max(1, np.abs(want[key]).max() if key != "output" else 0), key


def test_dirac_start_is_the_picture_network_bit_for_bit():
    torch.manual_seed(0)
    for kind in ("dense", "depthwise"):
        for padding in ("zeros", "reflect"):
            flat = Denoiser(DenoiserConfig(latent=4, condition=4, text=16, channels=(32, 64), blocks=1, attention=(False, True), head=8, slices="none")).eval()
            for p in flat.parameters(): torch.nn.init.normal_(p, std=.1)
            deep = Denoiser(flat.config.model_copy(update=dict(slices=kind, padding=padding))).eval()
            missing = deep.load_state_dict(flat.state_dict(), strict=False)
            assert not missing.unexpected_keys and all(".slice." in k for k in missing.missing_keys)
            z, m, text = torch.randn(2, 4, 5, 8, 8), torch.randn(2, 4, 5, 8, 8), torch.randn(2, 7, 16)
            with torch.no_grad(): assert torch.equal(flat(z, torch.tensor([5, 900]), m, text), deep(z, torch.tensor([5, 900]), m, text))


def test_keys_of_the_full_network():
    full = json.loads((HERE / "keys_full.json").read_text())
    with torch.device("meta"): net = Denoiser(sized("official"))
    ours = {k: list(v.shape) for k, v in to_released(net).items()}
    assert ours == full["unet_3d"]
    assert sum(p.numel() for p in net.parameters()) == 481_863_776
    assert sum(p.numel() for s in net.slices for p in s.parameters()) == 61_445_776 and len(net.slices) == 52


def test_depthwise_parameters_of_the_paper():
    with torch.device("meta"): net = Denoiser(sized("official", slices="depthwise"))
    assert sum(p.numel() for s in net.slices for p in s.parameters()) == 118_336


KEYMAP = json.loads((HERE / "keymap_small.json").read_text())


def shaped(case, slices="none", padding="zeros"):
    c = case["released_config"]
    return Denoiser(DenoiserConfig(latent=c["out_channels"], condition=c["in_channels"] - c["out_channels"], text=c["context_dim"], channels=[c["model_channels"] * m for m in c["channel_mult"]], blocks=c["num_res_blocks"],
                                   attention=[2**l in c["attention_resolutions"] for l in range(len(c["channel_mult"]))], head=c["num_head_channels"], slices=slices, padding=padding))


@pytest.mark.parametrize("name", sorted(KEYMAP["cases"]))
def test_key_map_is_the_verified_one(name):
    "Key by key, both ways, and nothing else: the map that was verified number for number against the released class"
    case = KEYMAP["cases"][name]
    net = shaped(case)
    assert released_keys(net) == case["map"]
    for released, value in to_released(net).items(): assert value.shape == net.unet.state_dict()[case["map"][released]].shape
    assert from_released(to_released(net), net.config).unet.state_dict().keys() == set(case["map"].values())


@pytest.mark.parametrize("name", sorted(KEYMAP["slice_convs"]["cases"]))
def test_slice_convolutions_follow_the_right_convolution(name):
    follows = KEYMAP["slice_convs"]["cases"][name]["slice_conv_follows"]
    case = CASES[name]
    ours = released_keys(Denoiser(config_of(case)))
    assert {k.removesuffix(".weight"): v.removesuffix(".slice.weight") for k, v in ours.items() if v.endswith(".slice.weight")} == follows


def test_the_layout_of_a_released_file_is_read():
    "What a released checkpoint holds beside the network is left out; anything else is refused"
    layout = json.loads((HERE / "layout.json").read_text())["state_dict"]
    net = shaped(KEYMAP["cases"]["small_2d"])
    for p in net.parameters(): torch.nn.init.normal_(p)
    state = {layout["unet"]["prefix"] + k: v for k, v in to_released(net).items()}
    beside = {k: torch.zeros(s) for k, s in layout["schedule"].items()} | {layout[part]["prefix"] + "x": torch.zeros(1) for part in ("vae", "text", "ema")}
    again = from_released(state | beside, net.config)
    for a, b in zip(net.state_dict().values(), again.state_dict().values()): assert torch.equal(a, b)
    with pytest.raises(DenoiserError, match="not of the released layout"): from_released(state | {"lvlb_weights": torch.zeros(1)}, net.config)
    means = {layout["ema"]["prefix"] + f"diffusion_model.{k}".replace(".", ""): 2*v for k, v in to_released(net).items()}
    assert torch.equal(from_released(state | means, net.config, ema=True).unet.conv_in.weight, 2*net.unet.conv_in.weight)


def test_text_is_read_once_and_never_stale():
    "The same text tensor at every step: its keys are kept; another text, or other weights, and they are made anew"
    import torch
    from fvae_nb.generation.denoiser import Denoiser, sized
    torch.manual_seed(0)
    net = Denoiser(sized("tiny", latent=4, condition=0, text=8)).eval()
    for p in net.parameters(): p.data.normal_(std=.05)
    z, t, a, b = torch.randn(1, 4, 3, 8, 8), torch.tensor([500.]), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    def fresh(text): return Denoiser.forward(net, z, t, text=text.clone())
    with torch.no_grad():
        first = net(z, t, text=a)
        assert torch.equal(net(z, t, text=a), first) and torch.equal(first, fresh(a))
        assert torch.equal(net(z, t, text=b), fresh(b)) and not torch.equal(fresh(b), first)
        net(z, t, text=a)
        for p in net.parameters(): p.mul_(1.1)
        assert torch.equal(net(z, t, text=a), fresh(a)) and not torch.equal(fresh(a), first)
    net(z, t, text=a).sum().backward()                                    # training never meets what inference kept
    assert all(m.to_k.weight.grad is not None for m in net.modules() if hasattr(m, "to_k"))
