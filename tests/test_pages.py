"""The HTML pages opened in headless Chromium and used as a reader uses them."""

import json
from pathlib import Path

from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from evaluate import Config, main

HOSTILE = {
    "<b>bold": "<script>window.broken = 1</script> a dog & a <img src=x onerror='window.broken = 2'> cat",
    "plain": "a dog runs </script> over grass {{data}}",
    "third": "two dogs",
}


def stems(browser) -> list[str]:
    return [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "td.photo div") if cell.is_displayed()]


def scores_page(folder: Path) -> Path:
    (folder / "photos").mkdir()
    for number, stem in enumerate(HOSTILE):
        Image.new("RGB", (60, 40), (80 * number, 90, 200)).save(folder / "photos" / f"{stem}.png")
    references = ["a dog runs over grass", "a dog and a cat", "two dogs"]
    images = [{"id": n, "file_name": f"{stem}.png"} for n, stem in enumerate(HOSTILE)]
    annotations = [{"image_id": n, "caption": f"{text} <i>{n}"} for n, text in enumerate(references)]
    (folder / "val.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (folder / "one.json").write_text(json.dumps(HOSTILE))
    other = dict.fromkeys(HOSTILE, "two dogs") | {"plain": "a dog runs over grass"}
    (folder / "two.json").write_text(json.dumps(other))
    main(
        Config(
            [folder / "one.json", folder / "two.json"],
            annotations=folder / "val.json",
            images=folder / "photos",
            metrics=["cider", "bleu"],
            page=folder / "scores.html",
        )
    )
    return folder / "scores.html"


def test_scores_page(browser, tmp_path):
    file = scores_page(tmp_path)
    content = json.loads((tmp_path / "scores.json").read_text())["runs"]
    browser.get(file.as_uri())
    assert stems(browser) == list(HOSTILE)
    assert [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "td.caption")][::2] == list(HOSTILE.values())
    assert browser.execute_script("return window.broken") is None
    assert not browser.find_elements(By.CSS_SELECTOR, "td b, td i, td img:not([src^='data:image/'])")
    assert all(browser.execute_script("return [...document.images].map(i => i.decode && i.naturalWidth)"))

    header = next(b for b in browser.find_elements(By.CSS_SELECTOR, "th button") if b.text.startswith("CIDEr-D"))
    for run in (0, 1):
        Select(browser.find_element(By.CSS_SELECTOR, "select")).select_by_index(run)
        by_score = sorted(HOSTILE, key=lambda stem: -content[run]["photos"][stem]["cider"])  # noqa: B023
        header.click()
        down = stems(browser)
        header.click()
        up = stems(browser)
        assert by_score in (down, up) and down[0] == up[-1]
        ordered = {"descending": down, "ascending": up}
        parent = header.find_element(By.XPATH, "..")
        assert ordered[parent.get_attribute("aria-sort")] == up

    browser.find_element(By.ID, "find").send_keys("TWO DOGS")
    assert set(stems(browser)) == {"<b>bold", "third"}  # whose captions say it, in the first run or the second
    browser.find_element(By.ID, "find").send_keys(" ")
    assert stems(browser) == []
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_page_of_a_thousand_photos_opens_in_a_second(browser, tmp_path):
    (tmp_path / "photos").mkdir()
    noise = Image.effect_noise((224, 224), 60).convert("RGB")
    stems = [f"photo_{n:04}" for n in range(1000)]
    for n, stem in enumerate(stems):
        noise.rotate(n).save(tmp_path / "photos" / f"{stem}.jpg")
    images = [{"id": n, "file_name": f"{stem}.jpg"} for n, stem in enumerate(stems)]
    texts = [f"a dog number {n} runs over wet grass in the morning" for n in range(5)]
    annotations = [{"image_id": n, "caption": text} for n in range(1000) for text in texts]
    (tmp_path / "val.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (tmp_path / "one.json").write_text(json.dumps({stem: f"a dog {n} runs" for n, stem in enumerate(stems)}))
    main(
        Config(
            [tmp_path / "one.json"],
            annotations=tmp_path / "val.json",
            images=tmp_path / "photos",
            metrics=["cider"],
            page=tmp_path / "scores.html",
        )
    )
    seconds = []
    for _ in range(3):
        browser.get((tmp_path / "scores.html").as_uri())
        timing = "const t = performance.timing; return t.loadEventEnd - t.navigationStart"
        seconds.append(browser.execute_script(timing) / 1000)
    assert sorted(seconds)[1] < 1, seconds
