"Headless Chromium for tests: opens a page, tells what it asked the network for and what it complained about."
import json, shutil, time
from contextlib import contextmanager
import pytest

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--allow-file-access-from-files"]


class Page:
    def __init__(self, driver): self.driver = driver
    def find(self, css):
        from selenium.webdriver.common.by import By
        return self.driver.find_elements(By.CSS_SELECTOR, css)
    def script(self, text, *args): return self.driver.execute_script(text, *args)
    def keys(self, *keys):
        from selenium.webdriver.common.action_chains import ActionChains
        ActionChains(self.driver).send_keys(*keys).perform()
    def wait(self, condition, seconds=30, what=""):
        "Until `condition()` is true; what it returned"
        end = time.monotonic() + seconds
        while not (got := condition()):
            if time.monotonic() > end: raise AssertionError(f"waited {seconds} s in vain {what}")
            time.sleep(.1)
        return got
    def screenshot(self, path): self.driver.save_screenshot(str(path)); return path
    def requests(self):
        "Addresses asked for that are not local files"
        rows = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        urls = [r["params"]["request"]["url"] for r in rows if r["method"] == "Network.requestWillBeSent"]
        return [u for u in urls if not u.startswith(("file:", "data:", "blob:", "chrome", "about:"))]
    def errors(self): return [e["message"] for e in self.driver.get_log("browser") if e["level"] == "SEVERE"]


def need_browser():
    if not shutil.which("chromium") or not shutil.which("chromedriver"): pytest.skip("Chromium and chromedriver are not installed")


@contextmanager
def open_page(address, tmp_path, size=(1200, 1400)):
    need_browser()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions(); options.binary_location = shutil.which("chromium")
    for flag in [*FLAGS, f"--user-data-dir={tmp_path}/chromium", f"--window-size={size[0]},{size[1]}"]: options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        driver.get(address)
        yield Page(driver)
    finally: driver.quit()
