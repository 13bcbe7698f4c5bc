"""The side panel of jobs in headless Chromium: it opens, is live, does what its buttons say, and outlives a restart."""

import os
import re
import shutil
import signal
import time

import pytest

from tests.nodes.browser import READY, Browser, missing_browser
from tests.nodes.comfy_server import ComfyServer
from tests.nodes.fake_jobs import PROMPTS, FakeRun, job_config, make_job, write_samples, write_steps
from train.jobs import ENDED, LOG, RUNNING, Status

TAB = ".kandinsky5-jobs-tab-button"
PANEL = ".k5-jobs"
PIXELS = """() => {
  const canvas = document.querySelector('.k5-chart canvas');
  if (!canvas || canvas.width === 0) return null;
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data, colours = new Set();
  let drawn = 0;
  for (let at = 0; at < data.length; at += 4) if (data[at + 3] > 0) {
    drawn += 1;
    colours.add(data[at] >> 5 << 10 | data[at + 1] >> 5 << 5 | data[at + 2] >> 5);
  }
  return drawn > 500 ? {drawn, colours: colours.size, bytes: data.join('').length} : null;
}"""
CONTRAST = """(selector) => {
  const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const luminance = (colours) => {
    context.clearRect(0, 0, 1, 1);
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
      .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  };
  const element = document.querySelector(selector), behind = [];
  for (let node = element; node; node = node.parentElement) behind.unshift(getComputedStyle(node).backgroundColor);
  const [low, high] = [luminance(behind), luminance([...behind, getComputedStyle(element).color])].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}"""


def jobs_folder(server):
    return server.base / "output" / "kandinsky5" / "jobs"


@pytest.fixture
def folder(comfy):
    """The server's jobs, none at first."""
    folder = jobs_folder(comfy)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def reload(page):
    page.page.reload()
    page.page.wait_for_function(READY, timeout=90_000)
    page.errors.clear()


def open_panel(page):
    page.page.locator(TAB).click(timeout=60_000)
    page.page.locator(PANEL).wait_for(timeout=60_000)


def close_panel(page):
    page.page.evaluate("() => { app.extensionManager.sidebarTab.activeSidebarTabId = null; }")
    page.page.locator(PANEL).wait_for(state="detached")


@pytest.fixture
def opened(folder, page):
    """Opens the panel on what the test has made, in a page that remembers nothing."""

    def open_():
        page.errors.clear()
        close_panel(page)
        page.page.evaluate("() => localStorage.removeItem('kandinsky5.jobs.selected')")
        open_panel(page)
        return page.page

    yield open_
    close_panel(page)
    assert page.errors == []


def text_of(page, selector):
    return page.locator(selector).first.inner_text()


def wait_text(page, selector, wanted, seconds=60):
    """Until an element's text has a part."""
    page.wait_for_function(
        "([selector, wanted]) => document.querySelector(selector)?.textContent.includes(wanted)", arg=[selector, wanted],
        timeout=seconds * 1000,
    )  # fmt: skip


def job_row(page, job):
    return page.locator(f'[data-job="{job.id}"]')


def test_without_jobs_it_says_how_to_begin(opened):
    page = opened()
    wait_text(page, ".k5-empty", "No training jobs yet")
    assert text_of(page, ".k5-title") == "Kandinsky 5 jobs"
    assert "Start Kandinsky 5 Training" in text_of(page, ".k5-empty")
    assert page.locator(TAB).get_attribute("aria-label") == "Kandinsky 5 jobs"


def test_jobs_are_listed_and_the_newest_is_shown(folder, opened):
    old = make_job(folder, "first", state="done", steps=500, result="/models/loras/first.safetensors", peak_bytes=3 << 29)
    time.sleep(1.1)
    new = make_job(folder, "second", steps=120, state="failed", message="out of memory: try a smaller area")
    page = opened()
    job_row(page, new).wait_for()
    assert page.locator("[data-job]").evaluate_all("rows => rows.map(row => row.dataset.job)") == [new.id, old.id]
    assert job_row(page, new).get_attribute("aria-current") == "true"
    shown = text_of(page, ".k5-details")
    assert "120 / 500" in shown and "LoRA 8" in shown and "nano-video" in shown and new.id in shown
    assert "out of memory: try a smaller area" in shown and "failed" in shown
    job_row(page, old).click()
    wait_text(page, ".k5-details h3", "first")
    page.wait_for_function("() => document.querySelector('.k5-result code').textContent.endsWith('first.safetensors')")
    assert "1.5 GiB" in text_of(page, ".k5-details")
    assert page.locator("[data-action=resume]").is_hidden() and page.locator("[data-action=stop]").is_hidden()


def test_the_chart_is_drawn(folder, opened):
    make_job(folder, "star", steps=200)
    page = opened()
    drawn = page.wait_for_function(PIXELS, timeout=60_000).json_value()
    assert drawn["colours"] >= 3  # the lines, the validation's points, the axes
    label = page.locator(".k5-chart").get_attribute("aria-label")
    assert "200" in label
    before = page.evaluate(PIXELS)["bytes"]
    page.locator(".k5-head button").click()
    page.wait_for_function(f"() => (({PIXELS})() ?? {{bytes: {before}}}).bytes !== {before}")
    assert page.locator(".k5-head button").get_attribute("aria-pressed") == "true"


def test_a_running_job_is_live_and_stops_from_the_button(folder, opened):
    job = make_job(folder, "star", steps=3, num_steps=100_000)
    with FakeRun(job, 0.05) as run:
        page = opened()
        job_row(page, job).wait_for()
        wait_text(page, f'[data-job="{job.id}"]', "left")
        step = "() => Number(/\\d+/.exec(document.querySelector('.k5-chart').ariaLabel.replace(/[,\\s]/g, ''))[0])"
        first = page.wait_for_function(f"() => document.querySelector('.k5-chart').ariaLabel && ({step})()").json_value()
        page.wait_for_function(f"() => ({step})() > {first} + 20", timeout=60_000)
        with (job.folder / LOG).open("a") as log:
            log.write("10%\r20%\rhello from the log\n")
        wait_text(page, ".k5-details .k5-log[aria-label=Log]", "\nhello from the log")
        tail = page.locator(".k5-details .k5-log[aria-label=Log]")
        assert tail.evaluate("log => log.scrollTop + log.clientHeight >= log.scrollHeight - 2")
        assert page.locator("[data-action=delete]").is_disabled() and page.locator("[data-action=resume]").is_hidden()
        write_samples(job, 100)
        page.locator('.k5-row[data-step="100"] img').first.wait_for()
        page.locator("[data-action=stop]").click()
        run.wait(lambda: not job.is_alive())
        assert job.read_status().state == "stopped"
        wait_text(page, f'[data-job="{job.id}"]', "stopped")
        page.locator("[data-action=resume]").wait_for()


def test_steps_undone_by_a_resume_leave_the_chart(folder, opened):
    job = make_job(folder, "star", steps=120)
    page = opened()
    last = "() => document.querySelector('.k5-chart').ariaLabel ?? ''"
    page.wait_for_function(f"() => ({last})().includes('Step 120')")
    job.write_status(Status(state="training", step=100, num_steps=500, updated=time.time()))
    write_steps(job, 101, 104)
    page.wait_for_function(f"() => ({last})().includes('Step 104')", timeout=60_000)


def test_samples_come_with_their_prompts_and_open_large(folder, opened):
    job = make_job(folder, "star", steps=250, sample_every=100)
    page = opened()
    thumbnails = page.locator('.k5-row[data-step="200"] .k5-thumb')
    thumbnails.first.wait_for()
    page.wait_for_function(
        "() => [...document.querySelectorAll('.k5-thumb img')].filter(image => image.naturalWidth === 96).length === 4"
    )
    assert [row.inner_text() for row in thumbnails.all()] == list(PROMPTS)
    rows = page.locator(".k5-row").evaluate_all("rows => rows.map(row => row.dataset.step)")
    assert rows == ["200", "100"]
    thumbnails.nth(1).focus()
    page.keyboard.press("Enter")
    viewer = page.locator("dialog.k5-viewer")
    viewer.wait_for()
    page.wait_for_function("() => document.querySelector('.k5-viewer img')?.naturalWidth === 96")
    assert "Step 200" in viewer.inner_text() and PROMPTS[1] in viewer.inner_text()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    assert "Step 100" in viewer.inner_text() and PROMPTS[0] in viewer.inner_text()
    assert f"/{job.id}/samples/100/00.png" in viewer.locator("img").get_attribute("src")
    page.keyboard.press("Escape")
    viewer.wait_for(state="detached")


def test_only_the_newest_samples_are_loaded_until_asked(folder, opened):
    make_job(folder, "star", steps=500, sample_every=25)
    page = opened()
    page.locator(".k5-row").first.wait_for()
    assert page.locator(".k5-row").count() == 8
    page.get_by_role("button", name="12 earlier").click()
    assert page.locator(".k5-row").count() == 20


def test_delete_asks_first(folder, opened):
    job = make_job(folder, "star", steps=10)
    page = opened()
    page.locator("[data-action=delete]").click()
    dialog = page.get_by_role("dialog")
    dialog.wait_for()
    assert job.id in dialog.inner_text()
    dialog.get_by_role("button", name="Cancel").click()
    dialog.wait_for(state="hidden")
    assert job.folder.exists()
    page.locator("[data-action=delete]").click()
    dialog.get_by_role("button", name="Delete").click()
    wait_text(page, ".k5-empty", "No training jobs yet")
    assert not job.folder.exists()


def test_what_fails_is_told(folder, opened):
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        pytest.skip("this machine has a desktop")
    job = make_job(folder, "star", steps=10)
    page = opened()
    page.locator("[data-action=open]").click()
    toast = page.locator(".p-toast-message")
    toast.wait_for()
    assert str(job.folder) in toast.inner_text()


def test_what_files_say_stays_text(folder, opened):
    evil = "<img src=x onerror='window.broken=1'><b>bold</b>"
    job = make_job(folder, "star", steps=100, sample_every=100, state="failed", message=evil, result=evil,
                   config=job_config(evil, prompts=(evil, "plain")))  # fmt: skip
    (job.folder / LOG).write_text(f"{evil}\n")
    (job.folder / "scan.txt").write_text(evil)
    page = opened()
    wait_text(page, ".k5-details .k5-log[aria-label=Log]", "onerror")
    page.locator(".k5-thumb").first.click()
    page.locator("dialog.k5-viewer").wait_for()
    assert evil in text_of(page, ".k5-viewer-prompt") and evil in text_of(page, ".k5-message")
    assert page.locator(".k5-panel b, .k5-panel img[src=x]").count() == 0
    assert page.evaluate("() => window.broken") is None
    page.keyboard.press("Escape")


def test_it_asks_the_server_only_while_it_is_open(folder, opened):
    make_job(folder, "star", steps=10)
    page = opened()
    page.locator("[data-job]").wait_for()
    page.wait_for_timeout(2500)
    asked = []
    page.on("request", lambda request: asked.append(request.url) if "/kandinsky5/jobs" in request.url else None)
    page.wait_for_timeout(6500)
    # A job at rest is not read again: the list alone.
    assert len(asked) >= 2 and all(re.search(r"/kandinsky5/jobs$", url) for url in asked), asked
    page.locator(TAB).click()
    page.locator(PANEL).wait_for(state="detached")
    page.wait_for_timeout(500)
    asked.clear()
    page.wait_for_timeout(5000)
    assert asked == []
    # Another tab takes its place without telling it.
    page.locator(TAB).click()
    page.locator("[data-job]").wait_for()
    page.locator(".workflows-tab-button").click()
    page.locator(PANEL).wait_for(state="detached")
    page.wait_for_timeout(2500)
    asked.clear()
    page.wait_for_timeout(5000)
    assert asked == []
    page.locator(TAB).click()
    page.locator("[data-job]").wait_for()


def test_the_chosen_job_is_there_after_a_reload(folder, opened, page):
    old = make_job(folder, "first", steps=120, sample_every=100)
    time.sleep(1.1)
    make_job(folder, "second", steps=10)
    opened()
    chosen = job_row(page.page, old)
    chosen.focus()
    page.page.keyboard.press("Enter")
    wait_text(page.page, ".k5-details h3", "first")
    reload(page)
    open_panel(page)
    wait_text(page.page, ".k5-details h3", "first")
    assert job_row(page.page, old).get_attribute("aria-current") == "true"
    page.page.wait_for_function(PIXELS, timeout=60_000)
    page.page.wait_for_function("() => document.querySelector('.k5-thumb img')?.naturalWidth === 96")


@pytest.mark.parametrize(
    ("locale", "title", "state", "loss"),
    [("ru", "Обучение Kandinsky 5", "остановлено", "Ошибка"), ("zh", "Kandinsky 5 训练任务", "已停止", "损失")],
)
def test_other_languages(folder, page, locale, title, state, loss):
    job = make_job(folder, "star", steps=120)
    page.set_locale(locale)
    try:
        open_panel(page)
        job_row(page.page, job).wait_for()
        assert text_of(page.page, ".k5-title") == title
        assert state in job_row(page.page, job).inner_text() and loss in text_of(page.page, ".k5-facts")
    finally:
        page.set_locale("en")


def test_every_language_has_every_text(page):
    texts = page.page.evaluate(
        """async () => {
          const file = (await (await fetch('/extensions')).json()).find(name => name.endsWith('/jobs_text.js'));
          return await (await fetch(file)).text();
        }"""
    )
    parts = re.split(r"\n  (en|ru|zh): \{", texts)
    keys = {name: re.findall(r"[{ \n](\w+): [\"\[{]", body.partition("\n  },")[0]) for name, body in zip(parts[1::2], parts[2::2], strict=True)}
    for body in parts[2::2]:
        states = re.search(r"\n    state: \{(.*)\}", body)[1]
        assert sorted(re.findall(r"(\w+): ", states)) == sorted((*RUNNING, *ENDED))
    assert len(keys["en"]) > 60 and sorted(keys["en"]) == sorted(keys["ru"]) == sorted(keys["zh"])


def test_buttons_have_names_and_text_is_readable_in_both_themes(folder, opened, page):
    make_job(folder, "star", steps=120, sample_every=100)
    opened()
    page.page.locator(".k5-thumb").first.wait_for()
    unnamed = page.page.locator(".k5-panel button").evaluate_all(
        "buttons => buttons.filter(b => !(b.ariaLabel || b.textContent).trim()).map(b => b.className)"
    )
    assert unnamed == []
    for theme in ("light", "dark"):
        page.page.evaluate("(theme) => app.extensionManager.setting.set('Comfy.ColorPalette', theme)", theme)
        page.page.wait_for_timeout(500)
        for selector in (".k5-title", ".k5-details h3", ".k5-facts dt", ".k5-facts dd", ".k5-log", ".k5-thumb-text",
                         ".k5-chip", "[data-action=open]"):  # fmt: skip
            assert page.page.evaluate(CONTRAST, selector) >= 4.5, (theme, selector)


@pytest.fixture
def own(comfyui):
    """A server and a page that may be stopped."""
    reason = missing_browser()
    if reason and os.environ.get("K5_REQUIRE_COMFYUI"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    with ComfyServer() as server:
        yield server


def test_it_outlives_a_restart_of_the_server(own, page):
    folder = jobs_folder(own)
    job = make_job(folder, "star", steps=60)
    tab = page._browser.new_page(viewport={"width": 1600, "height": 1000})
    try:
        tab.goto(own.url)
        tab.wait_for_function(READY, timeout=90_000)
        tab.wait_for_timeout(1500)
        tab.keyboard.press("Escape")  # the templates of a first visit
        tab.locator(TAB).click()
        wait_text(tab, ".k5-details h3", "star")
        os.killpg(own.process.pid, signal.SIGKILL)
        own.process.wait()
        tab.locator(".k5-banner").wait_for(timeout=60_000)
        assert "not reachable" in text_of(tab, ".k5-banner")
        assert "star" in text_of(tab, ".k5-details h3")
        # The job goes on meanwhile.
        with FakeRun(job, 0.05) as run:
            run.wait(lambda: job.read_status().step > 70)
            own._start(own.process.args)
            own._wait_until_ready()
            tab.locator(".k5-banner").wait_for(state="hidden", timeout=60_000)
            wait_text(tab, f'[data-job="{job.id}"]', "training")
            tab.locator("[data-action=stop]").click()
            run.wait(lambda: not job.is_alive())
            wait_text(tab, f'[data-job="{job.id}"]', "stopped")
    finally:
        tab.close()


def test_the_panel_is_a_tab_of_the_frontend(comfy, page):
    assert isinstance(page, Browser)
    tabs = page.page.evaluate("() => app.extensionManager.getSidebarTabs().map(tab => [tab.id, tab.title])")
    assert ["kandinsky5-jobs", "Kandinsky 5 jobs"] in tabs
    files = comfy.get("/extensions")
    assert any(file.endswith("/vendor/uplot/uPlot.esm.js") for file in files)
