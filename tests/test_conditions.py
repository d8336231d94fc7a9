"Masks and text as the denoiser reads them, against the release's numbers and through real VAEs."
import json
import numpy as np
import pytest
import torch
from hypothesis import given, settings as hsettings, strategies as st
from conftest import FIXTURES
from fvae_nb.data.ct import DataError
from fvae_nb.data.labels import TABLE7
from fvae_nb.generation.conditions import (CODES, TEXT_ENCODERS, decode_mask, disease_map, encode_mask, lattice, load_text_encoder, mask_video, paint, prompt, read_mask_video)
from fvae_nb.vaes.interface import WeightsError, load_vae

FACTS = json.loads((FIXTURES / "sampling/conditioning.json").read_text())
GROUPS = dict(lung=range(28, 33), heart=(115, 108), rib=range(63, 87), vessel=(133,), lesion=range(250, 263))


def test_gray_levels_are_the_releases():
    organs = np.array(FACTS["organ_labels"], np.uint8).reshape(1, 1, -1)
    for code, key in (("official-healthy", "healthy_mask_values"), ("official-multi", "multi_mask_values")):
        ours = mask_video(organs, None, code)[0, 0, 0, 0] / 2                    # the release writes them in [-0.5, 0.5]
        np.testing.assert_allclose(ours, FACTS[key], atol=1e-6)
    ids = np.array(FACTS["disease_classes"], np.uint16).reshape(1, 1, -1) + 100
    ours = mask_video(np.full(ids.shape, 28, np.uint8), ids, "official-multi")[0, 0, 0, 0] / 2
    np.testing.assert_allclose(ours, FACTS["multi_disease_values"], atol=1e-6)


def test_image_values_and_way_back_are_the_releases():
    from fvae_nb.data.ct import unwindow_ct, window_ct
    np.testing.assert_allclose(window_ct(np.array(FACTS["hu"], np.float32)) / 2, FACTS["image_values"], atol=1e-6)
    hu = unwindow_ct(np.clip(2 * np.array(FACTS["post"]["decoded"], np.float32), -1, 1))
    assert np.abs(hu - FACTS["post"]["hu_int16"]).max() < 1                      # the release truncates, we round when writing


def test_prompts_are_the_releases():
    for row, wanted in zip(FACTS["merged"], FACTS["prompts"]): assert prompt(sentences=row[3], style="official-multi") == wanted
    assert prompt("Normal 'chest' (CT).", style="official-multi") == "Normal chest CT."


@hsettings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(sorted(CODES)), st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)))
def test_every_code_reads_back(seed, code, shape):
    rng = np.random.default_rng(seed)
    organs = rng.choice([0, *TABLE7], shape).astype(np.uint8)
    disease = None if code == "official-healthy" else np.where(rng.random(shape) < .4, rng.integers(250, 263, shape), 0).astype(np.uint16)
    video = mask_video(organs, disease, code)
    noisy = video + torch.from_numpy(rng.uniform(-.002, .002, video.shape)).float()   # less than half a gray step of 1/400
    assert np.array_equal(read_mask_video(noisy, code), paint(organs, disease))


def test_lattice_keeps_touching_structures_apart():
    table = lattice()
    flips = lambda a, b: int((np.sign(table[a]) != np.sign(table[b])).sum())
    assert flips(30, 133) == 3 and flips(200, 70) == 3 and flips(261, 30) == 2 and flips(115, 29) >= 1 and flips(0, 200) >= 1
    assert flips(104, 1) >= 1 and flips(121, 200) >= 1


def _chest():
    "A block of a chest with all groups, 8 slices of 64x64: lung with vessels and a lesion, heart, ribs in a wall"
    organs = np.full((9, 64, 64), 200, np.uint8)
    organs[:, :4] = 0; organs[:, 10:54, 10:30] = 30; organs[:, 10:54, 34:54] = 28; organs[:, 24:50, 26:40] = 115
    organs[:, 14:40, 16:18] = 133; organs[:, 20:23, 40:52] = 133
    for n in range(4): organs[:, 12 + 10*n:16 + 10*n, 5:9] = 63 + n
    lesion = np.zeros(organs.shape, np.uint16); lesion[2:8, 40:48, 14:22] = 261
    return organs, lesion


def _dice(vae, code):
    organs, lesion = _chest()
    labels = paint(organs, lesion)
    back = decode_mask(vae, encode_mask(vae, organs, lesion, code), organs.shape, code)
    out = {}
    for name, ids in GROUPS.items():
        a, b = np.isin(labels, list(ids)), np.isin(back, list(ids))
        out[name] = 2*(a & b).sum() / (a.sum() + b.sum())
    return out


@pytest.mark.parametrize("name", ["tiny", "taef2"])
def test_lattice_survives_the_vae_better_than_gray(name, request):
    vae = load_vae("tiny") if name == "tiny" else request.getfixturevalue("taef2")
    ours, gray = _dice(vae, "lattice"), _dice(vae, "official-multi")
    print(name, {k: (round(ours[k], 3), round(gray[k], 3)) for k in ours})
    assert all(ours[k] > gray[k] for k in ours), (ours, gray)
    assert ours["lung"] > .9 and ours["lesion"] > .6


def test_mask_latent_has_the_scans_grid_and_streams():
    organs, lesion = _chest()
    tiny = load_vae("tiny")
    whole, pieces = encode_mask(tiny, organs, lesion, chunk=9), encode_mask(tiny, organs, lesion, chunk=2)
    assert whole.shape == (1, 48, 3, 8, 8) and torch.allclose(whole, pieces, atol=2e-5)
    assert encode_mask(tiny, organs, lesion, "paper").shape[1] == 32 and encode_mask(tiny, organs, None, "official-healthy").shape[1] == 16
    dct = load_vae("dct")
    assert encode_mask(dct, organs, None, "lattice").shape[1] == (48 if dct.spec.inputs == 1 else 16)


def test_paper_keeps_the_organ_under_a_lesion():
    organs, lesion = _chest()
    video = mask_video(organs, lesion, "paper")
    assert torch.equal(video[:, 0], mask_video(organs, None, "paper")[:, 0]) and (video[:, 2] == -1).all()


def test_several_findings_overlap_in_order_and_healthy_is_none():
    a = np.zeros((1, 2, 2)); a[0, 0] = 1
    b = np.zeros((1, 2, 2)); b[0, :, 0] = .6
    assert disease_map((1, 2, 2), [(154, a), (161, b)]).tolist() == [[[261, 254], [261, 0]]]
    assert disease_map((1, 2, 2), []) is None
    with pytest.raises(DataError, match="150 to 162"): disease_map((1, 2, 2), [(99, a)])
    with pytest.raises(DataError, match="resample the mask"): disease_map((1, 2, 3), [(154, a)])


def test_bad_masks_are_refused():
    organs, lesion = _chest()
    with pytest.raises(DataError, match="knows no disease"): mask_video(organs, lesion, "official-healthy")
    with pytest.raises(DataError, match="not in Table 7"): mask_video(np.full((1, 2, 2), 130), None)
    with pytest.raises(DataError, match="class \\+ 100"): mask_video(organs, lesion - 100, "lattice")
    with pytest.raises(DataError, match="one of lattice"): mask_video(organs, None, "rainbow")


def test_offline_text_states():
    try: encoder = load_text_encoder("minilm", tokens=32)
    except WeightsError as error: pytest.skip(str(error))
    states = encoder(["Small left pleural effusion.", "No fracture."])
    assert states.shape == (2, 32, TEXT_ENCODERS["minilm"].width) and states.dtype == torch.float32
    alone = encoder("Small left pleural effusion.")
    assert torch.allclose(alone[0], states[0], atol=1e-5)                        # a batch changes nothing, nor does a second call
    assert not encoder.net.training and not any(p.requires_grad for p in encoder.net.parameters())
    assert encoder.cut("word " * 100) > 60 and encoder.cut("word") == 0
    with pytest.raises(WeightsError, match="it reads 512"): load_text_encoder("minilm", tokens=1000)


def test_text_encoder_from_a_folder_as_cxr_bert_is_stored(tmp_path):
    "A small BERT of the real layout: all 512 states, padding attended to by none, pooler ignored"
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "nodule", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = transformers.BertConfig(vocab_size=len(words), hidden_size=768, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(tmp_path)
    encoder = load_text_encoder("cxr-bert", weights=str(tmp_path))
    states = encoder("No nodule.")
    assert states.shape == (1, 512, 768) and encoder.net.pooler is None
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    assert torch.allclose(encoder.net(ids).last_hidden_state[0], states[0, :5], atol=1e-5)     # lower-cased, and padding does not leak in
    with pytest.raises(WeightsError, match="cannot be read"): load_text_encoder("cxr-bert", weights=str(tmp_path / "nowhere"))
    with pytest.raises(WeightsError, match="known: minilm, cxr-bert"): load_text_encoder("clip")
