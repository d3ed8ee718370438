"""Pages in a real browser: headless Chromium shows a page in frames of given widths and says what it sees."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..effort import PATIENCE

PHONE, DESK = 390, 1280
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
POLICY = re.compile(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>")
# A window cannot be narrower than 500 px, a frame can; media queries in it go by its own width. The last frame has no
# Content-Security-Policy, so that a load which the policy would stop is seen as one.
SCRIPT = """
const width = element => { const box = element.getBoundingClientRect(); return [box.width, box.height]; };
const scrolls = element => element
  && (getComputedStyle(element).overflowX === "auto" || scrolls(element.parentElement));
const look = frame => {
  const page = frame.contentDocument, root = page.documentElement;
  const view = frame.contentWindow;
  const figures = [...page.querySelectorAll("svg, canvas, img")];
  const cut = [...page.querySelectorAll("svg text")].filter(text => {
    const box = text.getBoundingClientRect(), all = text.ownerSVGElement.getBoundingClientRect();
    const air = Math.min(box.width, box.height) / 5;  // above and below the letters a line is empty
    return box.left < all.left - air || box.right > all.right + air || box.top < all.top - air
      || box.bottom > all.bottom + air;
  });
  const wide = [...page.body.querySelectorAll("*")].filter(
    element => element.getBoundingClientRect().right > root.clientWidth + 1 && !scrolls(element));
  return {
    frame: root.clientWidth, scroll: Math.max(root.scrollWidth, page.body.scrollWidth), figures: figures.map(width),
    text: page.body.innerText.length, blank: page.querySelectorAll("img").length
      - [...page.querySelectorAll("img")].filter(image => image.naturalWidth > 0).length,
    cut: cut.map(text => text.textContent), wide: wide.map(element => element.outerHTML.slice(0, 120)),
    loads: view.performance.getEntriesByType("resource").map(entry => entry.name)
      .filter(name => !name.startsWith("data:")),
  };
};
addEventListener("load", () => {
  const seen = [...document.querySelectorAll("iframe")].map(look);
  document.body.innerHTML = "";
  document.body.append(Object.assign(document.createElement("pre"), {id: "seen", textContent: JSON.stringify(seen)}));
});
"""


@dataclass(frozen=True)
class Seen:
    """A page in a frame of one width."""

    frame: int
    scroll: int
    """How wide the page is: more than the frame has to be scrolled sideways."""
    figures: list[tuple[float, float]]
    """Width and height of every svg, canvas and img."""
    text: int
    blank: int
    """Pictures that could not be shown."""
    cut: list[str]
    """Words of a figure that stand outside of it and are cut off."""
    wide: list[str]
    """Elements that reach out of the page."""
    loads: list[str]


@dataclass(frozen=True)
class Shown:
    """What Chromium made of a page."""

    phone: Seen
    desk: Seen
    free: Seen
    """Without a Content-Security-Policy."""
    console: list[str]


def find_browser() -> str | None:
    """Get the path of a Chromium or Chrome that starts, None without one: Ubuntu's stand-in for its snap does not."""
    return next((path for name in NAMES if (path := shutil.which(name)) and _starts(path)), None)


def _starts(path: str) -> bool:
    return not subprocess.run([path, "--version"], capture_output=True, timeout=PATIENCE).returncode


def show(page: str, browser: str, folder: Path) -> Shown:
    """Get what a page looks like on a phone and on a desk."""
    free = POLICY.sub("", page)
    frames = [(page, PHONE), (page, DESK), (free, PHONE)]
    shown = "".join(
        f'<iframe srcdoc="{html.escape(text)}" style="width:{width}px;height:844px;border:0"></iframe>'
        for text, width in frames
    )
    (folder / "frames.html").write_text(f"<!doctype html><body>{shown}<script>{SCRIPT}</script></body>", "utf-8")
    command = [
        browser, "--headless=new", "--no-sandbox", "--hide-scrollbars", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}", "--window-size=1600,1000", "--enable-logging=stderr", "--v=0",
        "--virtual-time-budget=2000", "--dump-dom", (folder / "frames.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, encoding="utf-8", errors="replace")
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert found, f"{browser} shows nothing: {done.returncode} {done.stderr[-800:]}"
    seen: list[dict[str, Any]] = json.loads(html.unescape(found[1]))
    parts = [Seen(**{**one, "figures": [(w, h) for w, h in one["figures"]]}) for one in seen]
    return Shown(*parts, console=re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr))
