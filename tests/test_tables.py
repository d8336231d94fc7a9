"The printed figures are consistent where they must be; every cell of ours has a source; three forms say the same."
import csv, io, json, math, re, shutil, subprocess
import numpy as np
import pytest
from fvae_nb.data.ct import DataError
from fvae_nb.evaluation.tables import (SEGMENTATION1, TABLE2, TABLE2_COLUMNS, TABLE3, Cell, Table, implied_iou, psnr_gap, table1, table2, table3, to_csv,
                                       to_latex, to_markdown, two_kinds, write_table)
from fvae_nb.vaes.zoo import TABLE1


def test_printed_averages_are_the_means_they_claim():
    for t in TABLE2.values():
        assert abs(np.mean(t[1:4]) - t[4]) < .011                                       # printed with two decimals
        if t[5] is not None: assert abs((t[5] + t[6])/2 - t[7]) < .011


def test_printed_psnr_and_mse_fit_one_definition():
    for name, tasks in TABLE1.items():
        for t in tasks: assert 0 <= psnr_gap(t[0], t[2]) < 2, name


def test_two_kinds_explain_a_pair_exactly():
    for d, p in ((.95, .84), (.7, .5), (.9, 1.)):
        dice, iou = 100*p*d, 100*p*d/(2 - d); out = two_kinds(dice, iou)
        assert out["share"] == pytest.approx(p) and out["dice"] == pytest.approx(100*d)
    assert [round(two_kinds(*TABLE3["Ours (paper)"][g])["share"], 2) for g in ("lung", "heart", "rib")] == [.84, .84, .82]
    assert implied_iou(100) == 100 and implied_iou(50) == pytest.approx(100/3)
    for bad in ((50, 60), (50, 0), (100, 90)):
        with pytest.raises(DataError, match="expected 0 < IoU"): two_kinds(*bad)


def scores():
    f = dict(value=.5, floor=.4, floor_n=6, same_n=.5)
    return dict(n=6, fvd=f, kid=f, fid={p: f for p in ("axial", "sagittal", "coronal")} | {"avg": {k: v for k, v in f.items() if k != "floor_n"}}, i2i=dict(score=70.), t2i=dict(score=40.), avg=55., real=dict(i2i_other_case=20., t2i=60., t2i_other_prompt=30.))


def tables():
    src = dict(run="runs/evaluate-1", params_sha256="ab")
    return [table1({"tiny": {"lung": {"psnr": dict(mean=30., sd=1., n=4)}}}, {"tiny": src}), table2([dict(split="normal", method="ours_1 & co", scores=scores(), source=src, features="CT-CLIP", seconds=4., memory_gb=2.)]),
            table3([dict(method="ours", groups={g: dict(dice=50., iou=40., median=60., n=4, n_zero=1) for g in ("lung", "vessel", "rib")}, source=src)])]


def test_every_cell_has_a_source_and_rows_fit():
    for t in tables():
        for row in t.rows:
            assert len(row) == len(t.head)
            for c in row[t.labels:]: assert c.value is None or c.source, (t.title, row)


def test_floors_and_real_rows_stand_inside_table2():
    t = tables()[1]; names = [r[1] for r in t.rows]
    assert names[:4] == ["ours_1 & co (n = 6)", "floor: real against real (n = 6)", "real scans of other cases", "real scans, own prompt"]
    assert t.rows[1][2].value == .4 and t.rows[1][2].n == 6 and t.head[2:] == TABLE2_COLUMNS and len(t.rows) == 8     # the paper's four rows of that split


def test_standins_lose_the_names_of_real_metrics():
    o = dict(split="normal", method="m", scores=scores(), source={"run": "r"}, features="tiny VAE latents (stand-in)")
    t = table2([o], paper=False); text = to_markdown(t)
    assert "FVD" not in text and "FID" not in text and "CT-CLIP" not in " ".join(t.head) and "stand-in" in t.title


def test_absent_groups_are_left_out_not_zero():
    t = tables()[2]; row = dict(zip(t.head, t.rows[0])); assert str(row["heart Dice"]) == "left out" and row["heart Dice"].value is None and str(row["lung no overlap"]) == "1"


def test_three_forms_say_the_same(tmp_path):
    for k, t in enumerate(tables()):
        md, tex, flat = (p.read_text() for p in sorted(write_table(t, tmp_path / f"t{k}"), key=lambda p: [".md", ".tex", ".csv"].index(p.suffix)))
        cells = list(csv.DictReader(io.StringIO(flat)))
        assert len(cells) == len(t.rows)*(len(t.head) - t.labels)
        for c in cells:
            if c["text"]: assert c["text"] in md and c["text"].replace("%", r"\%").replace("±", r"$\pm$") in tex
            if c["value"] and "paper" not in json.loads(c["source"]): assert json.loads(c["source"])["run"]
        body = [l for l in md.splitlines() if l.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", l)) for l in body}) == 1 and tex.count(r"\\") == len(t.rows) + 1
    assert r"ours\_1 \& co" in to_latex(tables()[1])


def test_markup_cannot_break_a_table():
    t = Table("a|b", ("x", "y"), (("q|r\ns", Cell(1., source={"run": "z"})),)); body = [l for l in to_markdown(t).splitlines() if l.startswith("|")]
    assert body[2] == r"| q\|r s | 1.00 |" and r"\textbackslash{}" in to_latex(Table("\\input{x}", ("a",), ()))


def test_the_printed_segmentation_is_whole(): assert len(SEGMENTATION1) == 8 and all(len(v) == 6 for v in SEGMENTATION1.values())


def test_a_floor_row_carries_the_floors_n_in_every_cell():
    s = scores() | dict(n=12); t = table2([dict(split="normal", method="m", scores=s, source={"run": "r"}, features="CT-CLIP")], paper=False); floor = t.rows[1]
    assert floor[1].endswith("(n = 6)") and [c.n for c in floor[2:7]] == [6]*5 and [c.value for c in floor[2:7]] == [.4]*5 and [c.n for c in t.rows[0][2:7]] == [12]*5


def test_other_features_rename_the_columns():
    head = lambda told: table2([dict(split="normal", method="m", scores=scores(), features=told)], paper=True)
    for told in ("CT-Net; RadImageNet ResNet-50", "CT-CLIP (vlm3d)", "CT-CLIP (strata of four: B2); RadImageNet ResNet-50", "CT-CLIP; RadImageNet ResNet-50 (fixed window)"):
        t = head(told); assert "Frechet, volumes" in t.head and "FVD CT-CLIP" not in t.head and "other features, not comparable" in t.title
    for told in ("CT-CLIP; RadImageNet ResNet-50", "CT-CLIP"): assert "FVD CT-CLIP" in head(told).head and "comparable" not in head(told).title
    assert "stand-in features" in head("tiny VAE latents (stand-in, 64^3 at 5 mm)").title


def test_several_segmenters_have_a_column_of_their_own():
    g = {"lung": dict(dice=50., iou=33., median=50., n=4, n_zero=0)}; row = lambda by: dict(method="m", by=by, groups=g, source={"run": "r"}, segmenter=f"what {by} is")
    both, one = table3([row("net"), row("thresholds")]), table3([row("net")])
    assert both.head[:2] == ("method", "segmented by") and [r[1] for r in both.rows[:2]] == ["net", "thresholds"] and all(len(r) == len(both.head) for r in both.rows) and "net: what net is" in both.notes
    assert one.head[1] == "lung Dice" and "Segmented by what net is." in one.notes and all(len(r) == len(one.head) for r in one.rows)
