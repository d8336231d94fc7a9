"What the job `page` makes, and what a hand can do with it: speed, lens, jumping to a label."
import json, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
from fvae_nb.data.ct import DataError, ct_volume, write_ct
from fvae_nb.show.page import viewer_html, write_page
from test_show import click, moved, outlined, pictures, ready, slice_shown

RNG = np.random.default_rng(1)
SCAN = ct_volume(RNG.uniform(-1000, 1000, (12, 30, 24)).astype(np.float32), (4, 2, 2), "scan")
BACK = SCAN.with_array(SCAN.array + RNG.normal(0, 60, SCAN.shape).astype(np.float32))
_labels = np.zeros(SCAN.shape, np.uint8)
_labels[1:5, 4:14, 3:9] = 3; _labels[3, 4:20, 3:9] = 3                 # most of it in slice 3
_labels[7:10, 8:12, 12:20] = 17; _labels[9, 8:14, 12:20] = 17          # in slice 9
MASK = SCAN.with_array(_labels, name="mask")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    from browser import open_page
    d = tmp_path_factory.mktemp("page")
    path = write_page(d / "viewer.html", {"scan": SCAN, "back": BACK}, MASK, error_against="scan", labels={3: "organ", 17: "lesion"}, mask_panel="mask")
    with open_page(path.as_uri(), d) as page: yield ready(page)


@pytest.fixture
def fresh(page):
    page.driver.refresh()
    return ready(page)


def place(page): return page.script("return view.at")


@pytest.mark.browser
def test_a_label_leads_to_the_slice_that_holds_most_of_it_in_every_plane(fresh):
    old = pictures(fresh)
    click(fresh, "[data-label='1']")
    want = [int(np.argmax((_labels == 17).sum(tuple(a for a in range(3) if a != axis)))) for axis in range(3)]
    assert slice_shown(fresh) == 9 and place(fresh) == want and moved(old, pictures(fresh)) == [True]*4
    fresh.keys("l"); assert slice_shown(fresh) == 3                     # from the last to the first
    fresh.keys("L"); assert slice_shown(fresh) == 9
    assert [b.get_attribute("aria-pressed") for b in fresh.find("[data-label]")] == ["false", "true"]
    fresh.keys("p"); assert slice_shown(fresh) == want[1]


@pytest.mark.browser
def test_the_mask_has_a_panel_of_its_own_in_its_colours(fresh):
    fresh.keys("\ue011", *["\ue014"]*3)                                 # Home, then slice 3
    red, want = pictures(fresh)[0], np.where(_labels[3] == 3, 0xe6, np.where(_labels[3] == 17, 0x56, 0))
    assert (red == want).all()
    assert [f.text.split("\n")[0] for f in fresh.find("figcaption b")] == ["mask", "scan", "back", "back − scan"]
    shown = outlined(fresh)
    assert shown[0] == 0 and min(shown[1:]) > 20


@pytest.mark.browser
def test_the_lens_enlarges_the_same_place_in_every_panel(fresh):
    from selenium.webdriver.common.action_chains import ActionChains
    ink = "return [...document.querySelectorAll('.lines')].map(c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].reduce((a, b) => a + (b > 0), 0))"
    box = fresh.find(".lines")[1]
    over = lambda: ActionChains(fresh.driver).move_to_element(box).move_by_offset(3, 3).perform()
    over(); before = fresh.script(ink)
    fresh.keys("z"); assert fresh.find("#lens")[0].get_attribute("aria-pressed") == "true"
    with_lens = fresh.script(ink)
    assert all(b > a + 3000 for a, b in zip(before, with_lens))         # a filled disc in each
    # the middle of the lens shows the voxel under the pointer: in the error panel and in the scan
    x, y = fresh.script("return view.point"); k = slice_shown(fresh)
    for n, volume in ((1, SCAN), (2, BACK)):
        got = fresh.script("const p = panels[arguments[0]], [w, h] = size(), c = p.lines; return c.getContext('2d').getImageData((view.point[0] + .5) * c.width / w, (view.point[1] + .5) * c.height / h, 1, 1).data[0]", n)
        assert abs(got - np.clip((volume.array[k, y, x] + 1000)/2000, 0, 1)*255) < 12
    click(fresh, "#lens"); over(); after = fresh.script(ink)
    assert all(b < a - 3000 for a, b in zip(with_lens, after))


@pytest.mark.browser
def test_speed_changes_how_fast_it_plays(fresh):
    def steps(ms):
        return fresh.driver.execute_async_script("const done = arguments[1]; let n = 0, old = view.at[0]; const t = setInterval(() => { if (view.at[0] != old) { n++; old = view.at[0]; } }, 4); setTimeout(() => { clearInterval(t); done(n); }, arguments[0])", ms)
    for _ in range(9): fresh.keys("-")
    assert fresh.find("#speed")[0].get_attribute("value") == "2"
    fresh.keys(" "); slow = steps(1600)
    for _ in range(9): fresh.keys("+")                                  # while it plays
    assert fresh.find("#speed")[0].get_attribute("value") == "40"
    fast = steps(1600); fresh.keys(" ")
    assert 1 <= slow <= 5 and fast > 3*slow, (slow, fast)
    fresh.script("const s = document.getElementById('speed'); s.value = 5; s.dispatchEvent(new Event('change'))")
    assert fresh.script("return view.speed") == 5


@pytest.mark.browser
def test_every_key_and_button_without_a_request_or_a_complaint(fresh):
    for key in "zlL+-ppp m1234 \ue014": fresh.keys(key)
    for button in fresh.find("button"): button.click()
    assert fresh.requests() == [] and fresh.errors() == []


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_everything_is_within_reach(tmp_path, scheme):
    from browser import open_page
    path = write_page(tmp_path / "viewer.html", {"scan": SCAN, "back": BACK}, MASK, error_against="scan", labels={3: "organ", 17: "lesion"}, mask_panel="mask", start=17)
    with open_page(path.as_uri(), tmp_path) as page:
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True})
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        page.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
        page.driver.refresh(); ready(page)
        assert slice_shown(page) == 9                                   # opened at label 17
        assert page.script("return document.documentElement.scrollWidth") <= 390
        assert page.script("return [...document.querySelectorAll('button, select, input')].filter(b => { const r = b.getBoundingClientRect(); return r.left < 0 || r.right > 390; }).length") == 0
        assert page.script("return Math.min(...[...document.querySelectorAll('button')].map(b => b.getBoundingClientRect().height))") >= 34      # a finger's width
        assert page.script("const r = document.getElementById('slice').getBoundingClientRect(); return r.bottom <= innerHeight && r.width > 100")  # the slider stays in sight
        page.script("""const c = panels[1].lines, r = c.getBoundingClientRect(); lens();
            for (const kind of ['pointerdown', 'pointerup', 'pointerleave']) c.dispatchEvent(new PointerEvent(kind, {pointerType: 'touch', bubbles: true, clientX: r.left + r.width / 2, clientY: r.top + r.height / 2}))""")
        assert page.script("return view.point") is not None             # stays when the finger is lifted
        page.screenshot(tmp_path / f"phone_{scheme}.png")


def test_start_must_be_a_label_of_the_mask():
    with pytest.raises(DataError, match="start=5: the mask has no such label; expected one of 3, 17"): viewer_html({"scan": SCAN}, MASK, start=5)
    with pytest.raises(DataError, match="there is no mask"): viewer_html({"scan": SCAN}, start=5)


# ---- the job -----------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "Two scans, one with a mask, and a run of reconstruct over them"
    d = tmp_path_factory.mktemp("work")
    (d / "ct").mkdir()
    for name in ("a", "b"): write_ct(SCAN.with_array(SCAN.array.round()), d / f"ct/{name}.nii.gz")
    write_ct(SCAN.with_array(np.where(_labels == 3, 115, np.where(_labels == 17, 261, 0)).astype(np.int16)), d / "a_mask.nii.gz", "int16")
    from fvae_nb.jobs import reconstruct
    return d, reconstruct.run(reconstruct.Params(vae=["dct"], cases=[str(d / "ct")], run=str(d / "reconstructed"))).folder


def metrics(folder, case): return json.loads((folder / f"cases/page/{case}.json").read_text())["metrics"]


@pytest.mark.browser
def test_a_page_per_case_opens_at_its_lesion_and_asks_for_nothing(work, tmp_path):
    from browser import open_page
    from fvae_nb.jobs import page as job
    d, reconstructed = work
    folder = job.run(job.Params(of=str(reconstructed), masks={"a": str(d / "a_mask.nii.gz")}, run=str(tmp_path / "run"))).folder
    assert sorted(p.name for p in (folder / "pages/page").iterdir()) == ["a.html", "b.html"]
    with open_page((folder / "pages/index.html").as_uri(), tmp_path, (1200, 900)) as page:
        links = page.find("a"); assert [a.text for a in links] == ["a", "b"]
        links[0].click(); page.wait(lambda: page.driver.title.startswith("a: dct")); ready(page)
        assert [f.text for f in page.find("figcaption b")] == ["real", "dct", "dct − real"]
        assert [b.text for b in page.find("[data-label]")] == ["heart", "Pulmonary nodules/masses"] and slice_shown(page) == 9
        old = pictures(page); page.keys("\ue014"); assert moved(old, pictures(page)) == [True]*3
        assert page.requests() == [] and page.errors() == []


@pytest.mark.browser
def test_a_generated_scan_stands_beside_its_mask(tmp_path):
    from browser import open_page
    from fvae_nb.jobs import generate, page as job
    made = generate.run(generate.Params(generator="tiny-random", phantoms=1, phantom_shape=(9, 32, 32), steps=1, fit=False, text="none", device="cpu", run=str(tmp_path / "made"))).folder
    folder = job.run(job.Params(of=str(made), run=str(tmp_path / "run"))).folder
    path, = (folder / "pages/page").iterdir()
    assert path.name.endswith("_SYNTHETIC.html")
    with open_page(path.as_uri(), tmp_path, (1200, 900)) as page:
        ready(page)
        assert [f.text for f in page.find("figcaption b")] == ["mask", "generated by tiny-random"] and "SYNTHETIC" in page.find("figcaption")[1].text
        assert pictures(page)[0].max() > 0
        assert page.requests() == [] and page.errors() == []


def test_a_page_stays_below_its_limit_by_showing_fewer_slices(work, tmp_path):
    from fvae_nb.jobs import page as job
    from fvae_nb.running.cases import JobError
    d, _ = work
    big = ct_volume(RNG.uniform(-1000, 1000, (60, 128, 128)).astype(np.float32))              # noise does not pack
    text, every, mb = job._page(job.Params(max_mb=.6), {"a": big}, None)
    assert len(text)/1e6 == mb <= .6 and every > 1
    with pytest.raises(JobError, match="max_mb = 0.6; raise every"): job._page(job.Params(max_mb=.6, every=1), {"a": big}, None)
    with pytest.raises(JobError, match="raise every, lower size"): job._page(job.Params(max_mb=.03), {"a": big}, None)


def test_a_full_chest_fits_into_a_mail(test_data):
    from fvae_nb.data.ct import read_ct
    from fvae_nb.jobs import page as job
    ct = read_ct(test_data / "ct/crlm_1004_ct.nii.gz")
    text, every, mb = job._page(job.Params(), {"real": ct, "back": ct.with_array(ct.array + 20)}, None, error_against="real")
    assert 1 < mb < 25 and every == 1, (mb, every)


def test_what_a_page_cannot_show_is_told(work, tmp_path):
    from fvae_nb.jobs import page as job
    from fvae_nb.running.cases import JobError
    from fvae_nb.running.jobs import make_params
    d, reconstructed = work
    for given, told in ({"of": str(d)}, "not a run's folder; expected a run of reconstruct or generate"), ({"cases": [str(d / "ct")], "masks": {"c": "x.nii.gz"}}, "no case named 'c'; there are a, b"):
        with pytest.raises(JobError, match=told): job.run(job.Params(**given, run=str(tmp_path / "bad")))
    with pytest.raises(JobError, match="no window named 'brain'; known: vae"): make_params("page", ["windows=lung,brain"])
    assert not (tmp_path / "bad").exists()


def test_a_changed_input_is_not_shown_as_the_old_one(work, tmp_path):
    from fvae_nb.jobs import page as job
    d, reconstructed = work
    params = job.Params(of=str(reconstructed), run=str(tmp_path / "run"), limit=1)
    from fvae_nb.running.jobs import open_run
    run = open_run("page", params)
    frozen = json.loads((run.folder / "cases.json").read_text()); frozen["cases"][0]["made"]["dct"]["sha256"] = "0"*64
    (run.folder / "cases.json").write_text(json.dumps(frozen))
    job.run(params)
    assert "is not the file it was" in json.loads((run.folder / "failed/page/a.json").read_text())["reason"]
