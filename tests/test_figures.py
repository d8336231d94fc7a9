"The paper's figures for any case: what they refuse, which words they colour, that pictures show every panel."
import numpy as np
import pytest
from fvae_nb.data.ct import DataError, ct_volume
from fvae_nb.evaluation import figures as F


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    import matplotlib; matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    shown = []; monkeypatch.setattr(plt, "show", lambda *a, **k: shown.append(plt.gcf())); yield shown
    plt.close("all")


def volume(shape=(12, 24, 24), synthetic=True): return ct_volume(np.random.default_rng(0).normal(-600, 200, shape).astype(np.float32), (5., 3., 3.), "c", synthetic)


def disease(v, ids=(259,)):
    out = np.zeros(v.shape, np.uint16)
    for n, i in enumerate(ids): out[3 + n:6 + n, 4 + 8*n:10 + 8*n, 4:12] = i
    return v.with_array(out)


def titles(fig): return [a.get_title() for a in fig.axes]
def heading(fig): return fig._suptitle.get_text()


def test_three_views_a_column_a_generator(quiet):
    real = volume(synthetic=False); F.show_generators({"real": real, "MAISI-v2": volume(), "other size": volume((8, 16, 16))}, (2, 5, 6), title="finding")
    assert len(quiet[0].axes) == 9 and [t for t in titles(quiet[0]) if t] == ["real", "MAISI-v2", "other size"] and heading(quiet[0]).startswith("SYNTHETIC. finding\nlung -1350")
    F.show_generators({"real": real}); assert "SYNTHETIC" not in heading(quiet[1])
    with pytest.raises(DataError, match="no volumes"): F.show_generators({})
    with pytest.raises(DataError, match="outside the grid"): F.show_generators({"real": real}, (12, 0, 0))


def test_targets_have_a_colour_each(quiet):
    v = volume(); F.show_targets(v, disease(v, (259, 261)), count=3)
    legend = quiet[0].legends[0]; assert [t.get_text() for t in legend.get_texts()] == ["Pleural effusion or thickening", "Pulmonary nodules/masses"]
    assert len(F.COLOURS) >= 12 and len({F.COLOURS[i] for i in (250, 253, 254, 256, 259, 261)}) == 6
    with pytest.raises(DataError, match="no target"): F.show_targets(v, disease(v, ()))
    with pytest.raises(DataError, match="resample"): F.show_targets(v, disease(volume((12, 20, 24))))


@pytest.mark.parametrize("text,ids,want", [
    ("Bilateral pleural effusions.", [259], [("pleural effusions", 259)]), ("No effusion. A mass in the left lung.", [259, 261], [("mass", 261)]), ("Massive cardiomegaly.", [261], []),
    ("Ground-glass opacities and consolidation; emphysema", [250, 253, 254], [("Ground-glass opacities", 254), ("consolidation", 250), ("emphysema", 253)]), ("A nodule.", [259], []), ("", [261], [])])
def test_words_that_a_mask_holds(text, ids, want):
    got = F.coloured_words(text, ids); assert [(t, i) for t, i in got if i] == want and "".join(t for t, _ in got) == text


def test_pages_escape_what_reports_hold():
    assert F.report_html("<script>nodule</script>", [261]).count("<script") == 0 and "&lt;script&gt;" in F.report_html("<script>nodule</script>", [261])


def test_slices_and_words_and_failures(quiet):
    real, made = volume(synthetic=False), volume(); d = disease(real)
    F.show_report_slices(real, made, d, "A long report, " * 30 + "with an effusion.", first=99)
    assert [t for t in titles(quiet[0]) if t.startswith("real")] == ["real, slice 9", "real, slice 10", "real, slice 11"]           # kept inside the scan
    words = [t for a in quiet[0].axes for t in a.texts if t.get_text() == "effusion"]; assert len(words) == 1 and words[0].get_color() == F.COLOURS[259]
    worst = F.worst_cases([dict(case="a", share=.9), dict(case="b", share=None), dict(case="c", share=.1), dict(case="d", share=float("nan"))], 1); assert [r["case"] for r in worst] == ["c"]
    F.show_failures([worst[0] | dict(real=real, made=made, disease=d)]); assert "generated: 10 % of the real contrast" in titles(quiet[1])
    with pytest.raises(DataError, match="no cases"): F.show_failures([])
