"Slices on paper, in a page without a kernel, and in a running JupyterLab."
import json, os, re, signal, socket, subprocess, sys, urllib.request
from pathlib import Path
import numpy as np
import pytest
from fvae_nb.data.ct import DataError, ct_volume
from fvae_nb.data.samples import ellipsoid_thorax
from fvae_nb.show.page import hu_levels, viewer, viewer_html, write_page
from fvae_nb.show.slices import PLANES, WINDOWS, take_plane

RNG = np.random.default_rng(0)
SCAN = ct_volume(RNG.uniform(-1000, 1000, (9, 14, 11)).astype(np.float32), (4, 1.5, 2), "scan")      # another length and spacing along each axis
BACK = SCAN.with_array(SCAN.array + RNG.normal(0, 60, SCAN.shape).astype(np.float32))
_labels = np.zeros(SCAN.shape, np.uint8); _labels[3:7, 4:9, 2:6] = 3; _labels[3:7, 4:9, 6:9] = 17
MASK = SCAN.with_array(_labels, name="mask")


def ready(page):
    page.wait(lambda: page.script("return document.body.dataset.ready"), what="for the viewer to unpack")
    return page


def pictures(page):
    "The gray (or red) values of every panel, as the browser holds them"
    return [np.array(p["data"]).reshape(p["h"], p["w"]) for p in page.script(
        "return [...document.querySelectorAll('.picture')].map(c => ({w: c.width, h: c.height, data: [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 == 0)}))")]


def outlined(page):
    "Pixels in the first label's colour on every panel's overlay"
    return page.script("""return [...document.querySelectorAll('.lines')].map(c => { const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0;
        for (let i = 0; i < d.length; i += 4) n += d[i] == 0xe6 && d[i + 1] == 0x9f && d[i + 2] == 0 && d[i + 3] == 255; return n; })""")


def moved(before, after): return [a.shape != b.shape or bool((a != b).any()) for a, b in zip(before, after)]


def click(page, css): page.find(css)[0].click()


def slice_shown(page): return int(page.find("#slice")[0].get_attribute("value"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    "Two volumes, their error and a mask, opened from disk"
    from browser import open_page
    d = tmp_path_factory.mktemp("page")
    path = write_page(d / "viewer.html", {"scan": SCAN, "back": BACK}, MASK, error_against="scan", labels={3: "one <b>organ</b>"}, title="a title")
    with open_page(path.as_uri(), d) as page: yield ready(page)


@pytest.fixture
def fresh(page):
    page.driver.refresh()
    return ready(page)


@pytest.mark.browser
@pytest.mark.parametrize("window", ["vae", "lung", "soft tissue", "bone"])
@pytest.mark.parametrize("axis", range(3))
def test_every_pixel_of_a_plane_is_the_voxel_it_should_be(fresh, axis, window):
    click(fresh, f"[data-plane='{axis}']"); click(fresh, f"[data-window='{list(WINDOWS).index(window)}']")
    fresh.keys("\ue011")                                       # Home
    lo, hi = WINDOWS[window]
    for k in range(SCAN.shape[axis]):
        if k: fresh.keys("\ue014")                             # right
        for volume, got in zip((SCAN, BACK), pictures(fresh)):
            want = np.clip((take_plane(volume, PLANES[axis], k)[0] - lo)/(hi - lo), 0, 1)*255
            assert got.shape == want.shape
            assert np.abs(got - want).max() <= 2.3             # half of a step, 255/109/2 grays in soft tissue and in the wider windows, 1/2 for rounding, and 1/2 more at a window's ends


@pytest.mark.browser
def test_planes_keep_millimetres(fresh):
    s, r, c = SCAN.spacing; S, R, C = SCAN.shape
    for axis, want in enumerate([R*r/(C*c), S*s/(C*c), S*s/(R*r)]):
        click(fresh, f"[data-plane='{axis}']")
        for canvas in fresh.find(".picture"): assert abs(canvas.size["height"]/canvas.size["width"]/want - 1) < .02
        assert PLANES[axis] in fresh.find("#where")[0].text


@pytest.mark.browser
def test_slider_wheel_and_keys_move_all_panels_together(fresh):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
    slider, old = fresh.find("#slice")[0], pictures(fresh)
    assert len(old) == 3 and slice_shown(fresh) == 4
    def check(want):
        nonlocal old
        new = pictures(fresh)
        assert slice_shown(fresh) == want and moved(old, new) == [True]*3
        old = new
    ActionChains(fresh.driver).move_to_element_with_offset(slider, slider.size["width"]//4, 0).click().perform()
    check(6)
    for key, want in [("\ue014", 7), ("\ue012", 6), ("\ue013", 7), ("\ue015", 6), ("\ue00e", 8), ("\ue00f", 0), ("\ue010", 8), ("\ue011", 0)]:  # right left up down, page up and down, end home
        fresh.keys(key); check(want)
    wheel = ScrollOrigin.from_element(fresh.find(".lines")[1])
    ActionChains(fresh.driver).scroll_from_origin(wheel, 0, -120).perform()
    fresh.wait(lambda: slice_shown(fresh) == 3); check(3)
    fresh.keys("p"); check(7); fresh.keys("p"); check(5); fresh.keys("p"); check(3)


@pytest.mark.browser
def test_window_presets_change_the_scans_and_leave_the_error(fresh):
    old = pictures(fresh)
    for n in (1, 2, 3, 0):
        click(fresh, f"[data-window='{n}']") if n % 2 else fresh.keys(str(n + 1))
        new = pictures(fresh)
        assert moved(old, new) == [True, True, False]
        assert [b.get_attribute("aria-pressed") for b in fresh.find("[data-window]")] == [str(i == n).lower() for i in range(4)]
        old = new


@pytest.mark.browser
def test_space_plays_and_stops_even_after_a_click_on_a_button(fresh):
    click(fresh, "[data-window='1']")
    fresh.keys(" "); seen = slice_shown(fresh)
    fresh.wait(lambda: slice_shown(fresh) != seen, 5); fresh.keys(" ")
    still = slice_shown(fresh)
    assert fresh.driver.execute_async_script("setTimeout(arguments[0], 400)") is None and slice_shown(fresh) == still
    assert fresh.find("[data-window='1']")[0].get_attribute("aria-pressed") == "true"


@pytest.mark.browser
def test_mask_is_outlined_where_it_lies_and_can_be_hidden(fresh):
    assert min(outlined(fresh)) > 20
    points = [(2.5, 4), (5.5, 4), (2.5, 9), (5.5, 9), (2, 4.5), (2, 8.5)]                           # columns and rows on the upper, lower and left edge of label 3
    for r, g, b, alpha in fresh.script("""const c = document.querySelector('.lines'), g = c.getContext('2d');
        return arguments[0].map(([x, y]) => [...g.getImageData(Math.round(x * c.width / 11) - (x % 1 == 0), Math.round(y * c.height / 14) - (y % 1 == 0), 1, 1).data])""", points):
        assert alpha > 100 and r > 200 and 130 < g < 190 and b < 30
    fresh.keys("m"); assert outlined(fresh) == [0, 0, 0]
    click(fresh, "#mask"); assert min(outlined(fresh)) > 20
    fresh.keys("\ue011"); assert outlined(fresh) == [0, 0, 0]       # no label in slice 0
    assert "one <b>organ</b>" in fresh.find(".bar")[-1].text and "label 17" in fresh.find(".bar")[-1].text


@pytest.mark.browser
def test_pointer_reads_hu_error_and_label(fresh):
    from selenium.webdriver.common.action_chains import ActionChains
    box, (s, r, c) = fresh.find(".lines")[0], (4, 6, 3)
    x, y = ((n + .5)/size*length - length/2 for n, size, length in ((c, SCAN.shape[2], box.size["width"]), (r, SCAN.shape[1], box.size["height"])))
    ActionChains(fresh.driver).move_to_element_with_offset(box, round(x), round(y)).click().perform()
    hu = [float(o.text.replace(" HU", "")) for o in fresh.find("figcaption output")]
    assert abs(hu[0] - SCAN.array[s, r, c]) <= 7.5 and abs(hu[1] - BACK.array[s, r, c]) <= 7.5      # half of the widest step, 14 HU
    assert abs(hu[2] - np.clip(BACK.array, -1000, 1000)[s, r, c] + SCAN.array[s, r, c]) <= 1.5      # error in steps of 200/127 HU
    assert fresh.find("#under")[0].text == "one <b>organ</b>"
    for plane, k in ((1, r), (2, c)):                                                               # the click set the other planes
        click(fresh, f"[data-plane='{plane}']"); assert slice_shown(fresh) == k


@pytest.mark.browser
def test_viewer_asks_for_nothing_and_complains_of_nothing(fresh):
    for key in "1234ppp m \ue014": fresh.keys(key)
    assert fresh.requests() == [] and fresh.errors() == []


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_viewer_on_a_phone(tmp_path, scheme):
    from browser import open_page
    path = write_page(tmp_path / "viewer.html", {"scan": SCAN, "back": BACK}, MASK, error_against="scan")
    with open_page(path.as_uri(), tmp_path) as page:
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True})
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        ready(page)
        assert page.script("return document.documentElement.scrollWidth") <= 360
        assert all(c.size["width"] > 300 for c in page.find(".picture"))
        back, ink = page.script("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color].map(c => c.match(/[0-9]+/g).slice(0, 3).reduce((a, b) => a + +b, 0))")
        assert (ink > back + 400) == (scheme == "dark") and abs(ink - back) > 400
        page.screenshot(tmp_path / f"phone_{scheme}.png")


@pytest.mark.browser
def test_names_from_files_stay_text(tmp_path):
    from browser import open_page
    bad = "</script><script>window.hacked=1</script><img src=http://example.invalid/x onerror=hacked=1>\"'&"
    html = viewer({bad: SCAN}, MASK, title=bad, labels={3: bad}).data
    (tmp_path / "report.html").write_text(f"<!doctype html><meta charset=utf-8>{html}")
    write_page(tmp_path / "page.html", {bad: SCAN}, MASK, title=bad, labels={3: bad})
    with open_page((tmp_path / "page.html").as_uri(), tmp_path) as page:
        assert [f.text for f in ready(page).find("figcaption b")] == [bad] and page.driver.title == bad
        assert page.script("return window.hacked") is None and page.find("img") == []
        page.driver.get((tmp_path / "report.html").as_uri())
        page.driver.switch_to.frame(page.find("iframe")[0])
        assert [f.text for f in ready(page).find("figcaption b")] == [bad] and page.script("return window.hacked || window.top.hacked") is None
        assert page.requests() == [] and page.errors() == []


@pytest.mark.browser
def test_two_viewers_in_one_report_do_not_meet_and_fit_their_frames(tmp_path):
    from browser import open_page
    (tmp_path / "report.html").write_text("<!doctype html><meta charset=utf-8><h1>report</h1>" + viewer({"a": SCAN}, height=100).data + viewer({"b": SCAN}, height=100).data)
    with open_page((tmp_path / "report.html").as_uri(), tmp_path) as page:
        def inside(n, act):
            page.driver.switch_to.frame(page.find("iframe")[n])
            try: return act(ready(page))
            finally: page.driver.switch_to.default_content()
        before = inside(1, pictures)
        inside(0, lambda p: (click(p, "[data-window='2']"), p.keys("\ue014")))
        assert inside(0, slice_shown) == 5 and inside(1, slice_shown) == 4 and not any(moved(before, inside(1, pictures)))
        assert not any(i.is_displayed() for i in page.find("img"))
        for frame in page.find("iframe"):
            page.wait(lambda: frame.size["height"] > 300)
            assert page.script("return arguments[0].contentDocument.documentElement.scrollHeight <= arguments[0].clientHeight", frame)
        assert page.requests() == [] and page.errors() == []


@pytest.mark.browser
def test_where_frames_and_styles_are_removed_a_still_picture_is_seen(tmp_path):
    "What an untrusted notebook does to the output"
    from browser import open_page
    html = re.sub(r"<style>.*?</style>|<iframe.*?</iframe>", "", viewer({"scan": SCAN}, MASK).data, flags=re.S)
    (tmp_path / "stripped.html").write_text(html)
    with open_page((tmp_path / "stripped.html").as_uri(), tmp_path) as page:
        assert [i.is_displayed() and i.size["width"] > 300 for i in page.find("img")] == [True]


def test_page_names_no_address_and_says_what_it_is():
    text = viewer_html({"made": ellipsoid_thorax((9, 32, 32))})
    assert not re.search(r"https?:|//[a-z]+\.|src=|href=|@import|url\(", text)
    assert "<title>SYNTHETIC: made</title>" in text and "Not for clinical use" in text
    assert "SYNTHETIC" not in viewer_html({"scan": SCAN})
    assert text == viewer_html({"made": ellipsoid_thorax((9, 32, 32))})        # no clock, no chance


def test_page_stays_small_and_says_what_it_left_out():
    noise = ct_volume(np.random.default_rng(1).uniform(-1000, 1000, (130, 400, 402)).astype(np.float32))   # noise packs worst
    text = viewer_html({"a": noise, "b": noise})
    assert len(text) < 12e6
    assert "shown: every 2nd slice, means of 2 × 2 pixels" in text
    assert json.loads(re.search(r"id=data>(.*?)</script>", text)[1])["shape"] == [65, 200, 201]


def test_levels_serve_every_window():
    for windows in (tuple(WINDOWS), ("lung",), ((-1000, -900), (500, 2000))):
        levels = hu_levels(windows)
        assert (np.diff(levels) > 0).all() and len(levels) == 256
        for w in windows:
            lo, hi = WINDOWS.get(w, w)
            assert ((levels >= lo) & (levels <= hi)).sum() >= 100, w


@pytest.mark.parametrize("words, call", [
    ("nothing to show", lambda: viewer_html({})),
    ("bring all onto one grid", lambda: viewer_html({"a": SCAN, "b": ct_volume(SCAN.array[1:])})),
    ("resample the mask", lambda: viewer_html({"a": SCAN}, ct_volume(MASK.array[1:]))),
    ("whole numbers", lambda: viewer_html({"a": SCAN}, SCAN.with_array(SCAN.array/3))),
    ("no such volume; expected one of 'a'", lambda: viewer_html({"a": SCAN}, error_against="b")),
    ("no window named 'brain'", lambda: viewer_html({"a": SCAN}, windows=("brain",))),
    ("every=0", lambda: viewer_html({"a": SCAN}, every=0)),
    ("max_size=0", lambda: viewer_html({"a": SCAN}, max_size=0))])
def test_what_cannot_be_shown_is_refused_in_one_line(words, call):
    with pytest.raises(DataError, match=re.escape(words)) as error: call()
    assert "\n" not in str(error.value)


# ---- the browser of show/browser in a running JupyterLab

_CODE = """import os, numpy as np
from pathlib import Path
from fvae_nb.data.samples import ellipsoid_thorax
from fvae_nb.show.browser import browse
thorax = ellipsoid_thorax((17, 64, 64), (14., 5.6, 5.6))
blurred = thorax.with_array(thorax.array[::-1]*.8)
mask = thorax.with_array(((thorax.array > -930) & (thorax.array < -700)).astype(np.uint8))
box = browse({"thorax": thorax, "<b>other</b>": blurred}, mask, window="lung")
Path("kernel.pid").write_text(str(os.getpid()))
box"""

_SUMS = """return Promise.all([...document.querySelectorAll('.jp-OutputArea img')].filter(i => i.offsetParent).map(async i => { await i.decode();
    const c = document.createElement('canvas'); c.width = i.naturalWidth; c.height = i.naturalHeight; const g = c.getContext('2d'); g.drawImage(i, 0, 0);
    const d = g.getImageData(0, 0, c.width, c.height).data; let n = 7; for (let k = 0; k < d.length; k++) n = (n * 31 + d[k]) % 1000000007; return n + ':' + c.width + 'x' + c.height; }))"""


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab of its own in an empty folder; its address"
    from browser import need_browser
    need_browser()
    pytest.importorskip("jupyterlab")
    book = dict(cells=[dict(cell_type="code", id="a", execution_count=None, metadata={}, outputs=[], source=_CODE)], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}, nbformat=4, nbformat_minor=5)
    (tmp_path / "work").mkdir(); (tmp_path / "work/book.ipynb").write_text(json.dumps(book))
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = os.environ | {k: str(tmp_path / k.lower()) for k in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", "--allow-root", "--IdentityProvider.token=", "--ServerApp.password=",
                                   "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.expose_app_in_browser=True"], cwd=tmp_path / "work", env=env, stdout=log, stderr=log)
    try: yield f"http://127.0.0.1:{port}", server, tmp_path
    finally:
        pid = tmp_path / "work/kernel.pid"
        if pid.is_file():
            for what in (signal.SIGCONT, signal.SIGTERM):
                try: os.kill(int(pid.read_text()), what)
                except ProcessLookupError: pass
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill(); server.wait()


def _answers(address):
    try: return urllib.request.urlopen(f"{address}/api/status", timeout=2).status == 200
    except OSError: return False


@pytest.mark.browser
def test_browser_moves_in_jupyterlab_while_the_kernel_is_stopped(lab):
    from browser import open_page
    address, server, folder = lab
    with open_page("about:blank", folder, size=(1300, 1100)) as page:
        page.wait(lambda: server.poll() is not None or _answers(address), 60, "for JupyterLab to start")
        assert server.poll() is None, (folder / "lab.log").read_text()[-2000:]
        page.driver.get(f"{address}/doc/tree/book.ipynb")
        page.wait(lambda: page.find(".jp-Notebook .jp-CodeCell") and page.script("return !!window.jupyterapp && window.jupyterapp.commands.hasCommand('notebook:run-all-cells')"), 60, "for the notebook")
        page.wait(lambda: page.script("const n = window.jupyterapp.shell.currentWidget; return !!(n && n.sessionContext && n.sessionContext.session && n.sessionContext.session.kernel && n.sessionContext.session.kernel.status == 'idle')"), 60, "for the kernel")
        page.script("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        sums = lambda: page.script(_SUMS)
        page.wait(lambda: len(page.find(".jp-OutputArea img")) == 4 and page.find(".noUi-handle"), 90, "for the browser")
        first = sums()                                                          # picture, outlines, picture, outlines
        assert len(first) == 4 and first[0] != first[2] and first[1] == first[3] and [s.split(":")[1] for s in first] == ["288x288"]*4
        os.kill(int((folder / "work/kernel.pid").read_text()), signal.SIGSTOP)  # from here on Python cannot answer
        handle = lambda: page.find(".noUi-handle")[0]
        def changed(old): return page.wait(lambda: (new := sums()) and len(new) == len(old) and new[0] != old[0] and new[2] != old[2] and new, 10, "for both panels to change")
        button = lambda text: next(b for b in page.find(".widget-toggle-button") if b.text.strip().startswith(text))
        handle().send_keys("\ue014"); second = changed(first)
        assert page.find(".widget-readout")[0].text == "9"
        handle().send_keys("\ue012"); assert changed(second) == first           # and back: the same pictures
        for name in ("soft tissue", "bone", "vae"): button(name).click(); second = changed(second if name != "soft tissue" else first)
        page.screenshot(folder / "lab_axial.png")
        button("coronal").click(); third = changed(second)
        handle().send_keys("\ue014"); fourth = changed(third)
        button("sagittal").click(); changed(fourth)
        page.screenshot(folder / "lab_sagittal.png")
        button("no outlines").click(); page.wait(lambda: len(sums()) == 2, 10, "for the outlines to go")
        page.find(".widget-play .jupyter-button")[0].click(); before = sums()
        page.wait(lambda: (new := sums()) and all(a != b for a, b in zip(new, before)), 10, "for Play to move both panels")
        assert page.script("return document.querySelector('.jp-OutputArea').textContent.includes('<b>other</b> SYNTHETIC')")
