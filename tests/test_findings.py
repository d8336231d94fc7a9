"The 18 columns, ReXGroundingCT's categories, and report text as each code cleans it."
import json
import pytest
from hypothesis import given, strategies as st
from fvae_nb.data.ct import DataError
from fvae_nb.data.findings import COLUMNS, FINDINGS, REPORT_CLEANING, REX, TABLE4_ORDER, TABLE6, clean_report, finding, is_normal, rex_category


def test_agrees_with_the_fact_sheet(test_data):
    facts = json.loads((test_data / "specs/findings.json").read_text())
    assert list(COLUMNS) == facts["columns"] and [f.abbrev for f in TABLE4_ORDER] == facts["table4_order"]
    assert [(f.index, f.column, f.abbrev, f.has_rex_mask) for f in FINDINGS] == [(x["index"], x["column"], x["abbrev"], x["has_rex_mask"]) for x in facts["findings"]]
    for n, split in enumerate(facts["table6"]["splits"]):
        assert (TABLE6[split]["total"], TABLE6[split]["normal"]) == (facts["table6"]["total_cases"][n], facts["table6"]["normal"][n])
        assert TABLE6[split]["counts"] == {c: v[n] for c, v in facts["table6"]["counts"].items()}
    assert {c: (x.name, x.focality, x.disease_class, list(x.columns)) for c, x in REX.items()} == {x["code"]: (x["name"], x["focality"], x["disease_class"], x["maps_to_findings"]) for x in facts["rex_categories"]}


def test_same_classes_as_the_labels():
    from fvae_nb.data.labels import DISEASE_CLASSES
    assert {x.disease_class for x in REX.values()} == set(DISEASE_CLASSES)
    for x in REX.values(): assert DISEASE_CLASSES[x.disease_class] == x.name


def test_totals_of_table_6():
    assert TABLE6["gen_train"]["total"] == 2395 + 2566 and TABLE6["gen_test"]["total"] == 30 + 50
    assert [t["normal"] + sum(t["counts"].values()) for t in TABLE6.values()] == [9216, 164, 1209, 1061]
    assert TABLE6["gen_test"]["counts"]["Hiatal hernia"] == 0 and TABLE6["down_test"]["counts"]["Hiatal hernia"] == 37


@pytest.mark.parametrize("wrong", ["Calcification", "pulmonary fibrotic", "", "2b"])
def test_a_shortened_name_is_refused(wrong):
    with pytest.raises(DataError, match="no finding named"): finding(wrong)


def test_lookups():
    for f in FINDINGS: assert finding(f.column) is finding(f.abbrev) is finding(f.index) is finding(f.column.upper()) is f
    assert finding("Pulmonary fibrotic sequelae").column == "Pulmonary fibrotic sequela"
    for i in (-1, 18):
        with pytest.raises(DataError): finding(i)
    for c in REX.values(): assert rex_category(c.code) is c and rex_category(c.name).name == c.name
    with pytest.raises(DataError, match="3 to 12"): rex_category("5a")


def test_unlabelled_is_not_normal():
    zero = dict.fromkeys(COLUMNS, 0)
    assert is_normal(zero) is True and is_normal(zero | {"Emphysema": 1}) is False
    assert is_normal(None) is None and is_normal({c: 0 for c in COLUMNS[1:]}) is None and is_normal(zero | {"Emphysema": None}) is None


nan = float("nan")
CASES = [ # findings, impression, cleaning -> text
    ('Clear (no "nodule").', "It's normal.", "ours", "Clear no nodule. Its normal."),
    ('Clear (no "nodule").', "It's normal.", "ctclip_train", "Clear no nodule."),
    ('Clear (no "nodule").', "It's normal.", "release_healthy", "Clear no nodule."),
    ("Clear.", "Normal.", "ctclip_infer", "Clear.Normal."),
    ("Not given.", "Normal.", "ctclip_infer", "Normal."),
    ("Not given.", None, "ctclip_train", "Not given."),
    ("Not given.", "Normal.", "ours", "Normal."),
    (nan, nan, "ours", ""), (None, None, "ours", ""), ("nan", "Not given.", "ours", ""),
    (nan, None, "ctclip_train", "nan"),
    (["One (1).", "Two"], None, "release_disease", "[One 1., Two]"),
    (["One."], None, "release_disease", "One."),
    (["One.", "Two"], None, "ours", "One. Two"),
    ("a\n\n b\tc", " d ", "ours", "a b c d"),
]


@pytest.mark.parametrize("findings, impression, compat, text", CASES)
def test_cleaning(findings, impression, compat, text): assert clean_report(findings, impression, compat) == text


def test_every_cleaning_has_a_case_and_others_are_refused():
    assert {c[2] for c in CASES} == set(REPORT_CLEANING)
    with pytest.raises(DataError, match="ctclip_train"): clean_report("x", compat="CT-CLIP")


@given(st.text(), st.text())
def test_ours_is_clean_and_cleaning_twice_changes_nothing(a, b):
    out = clean_report(a, b)
    assert not set("\"'()") & set(out) and out == " ".join(out.split())
    assert clean_report(out) in (out, "")                   # a text can become 'Not given.' only by losing its parentheses
