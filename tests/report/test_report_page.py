"""The page as written: whole, escaped, alone, the same for the same inputs; and where it may be written."""

import base64
import html.parser
import itertools
import json
import re

import pytest

import result_factory as factory
from hici.cli.main import main
from hici.report.gather import REPORT_MARKER, gather
from hici.report.page import Cell, Facts, Figure, Heading, Part, Picture, Table, Text, render_page, slug
from hici.report.section import all_sections
from hici.report.write import write_report

ORDER = ["Summary", "Perplexity against length", "Loss by position", "Retrieval", "Attention by layer",
         "Slots across segments", "LongBench", "LongEval", "lm-evaluation-harness", "Training",
         "Training comparison", "Speed and memory", "Differences between runs", "Differences in settings",
         "Provenance"]  # fmt: skip
VOID = {"meta", "link", "img", "source", "br"}


class Page(html.parser.HTMLParser):
    """Elements in order, as (tag, attributes, text before its first child), checked to be nested properly."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.elements:
            self.elements[-1][2] += data

    def of(self, tag):
        return [(attrs, text.strip()) for name, attrs, text in self.elements if name == tag]


@pytest.fixture
def small(tmp_path):
    """A directory with one result, which is drawn fast: no figure."""
    factory.write(tmp_path / "run" / "lm.json", factory.lm())
    return tmp_path / "run"


def test_every_section_stands_in_its_order_and_is_linked(report):
    _, text = report
    page = Page(text)
    assert [title for _, title in page.of("h2")] == ["Contents", *ORDER]
    assert [section.title for section in all_sections()] == ORDER
    ids = [attrs["id"] for _, attrs, _ in page.elements if "id" in attrs]
    assert len(set(ids)) == len(ids)
    links = [attrs["href"] for attrs, _ in page.of("a")]
    assert links == ["#content", *(f"#{slug(title)}" for title in ORDER)]
    assert {link[1:] for link in links} <= set(ids)
    for _, attrs, _ in page.elements:
        assert set(attrs.get("aria-labelledby", "content").split()) <= set(ids)
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_it_needs_nothing_else(report):
    directory, text = report
    page = Page(text)
    assert page.of("html")[0][0]["lang"] == "en"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [a for a, _ in page.of("meta")]
    (policy,) = [a["content"] for a, _ in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not page.of("script")
    for _, attrs, _ in page.elements:
        for name in ("src", "srcset", "href"):
            assert attrs.get(name, "data:").startswith(("data:", "#"))
    assert "url(" not in text
    assert "@import" not in text
    pictures = {path.name: path.read_bytes() for path in directory.glob("*.png")}
    shown = [base64.b64decode(attrs["src"].partition("base64,")[2]) for attrs, _ in page.of("img")]
    assert sorted(pictures.values()) == sorted(shown)
    assert {"training.png", "perplexity-published.png", "retrieval-passkey.png", "attention-shares.png"} <= set(
        pictures
    )
    marker = json.loads((directory / REPORT_MARKER).read_text())
    assert marker["files"] == sorted([*pictures, "index.html"])


def test_every_figure_says_its_numbers_in_words_and_has_a_table(report):
    _, text = report
    page = Page(text)
    figures = page.of("figure")
    assert len(figures) == len(page.of("img")) == len(page.of("figcaption")) == len(page.of("picture")) >= 14
    for attrs, _ in page.of("img"):
        assert len(attrs["alt"]) > 60
        assert re.search(r"\d", attrs["alt"])
        assert int(attrs["width"]) > 1000
    for block in re.findall(r"<figure.*?</figure>", text, re.DOTALL):
        assert block.count("<summary>Numbers of this figure</summary>") == 1
        assert block.count("<table") == 1
    for attrs, _ in page.of("div"):
        if attrs.get("class") == "scroll":
            assert attrs["tabindex"] == "0"
            assert attrs["role"] == "region"
            assert "aria-labelledby" in attrs or attrs["aria-label"]


def test_not_causal_stands_beside_its_numbers(report):
    _, text = report
    mentions = re.findall(r"hici, all(.{0,14})", text)
    assert len(mentions) > 10
    assert all(after.startswith(" (not causal)") for after in mentions), mentions
    assert "is no perplexity of a language model" in text
    assert "adapter was trained with visibility all: its loss in hici attention" in text


def test_numbers_are_those_of_the_results(report):
    directory, text = report
    record = json.loads((directory.parent / "adapter" / "eval" / "ppl.json").read_text())
    plain = re.sub(r"\s*<[^>]+>\s*", "|", text)
    for condition in record["conditions"]:
        assert f"|{condition['context']:,}||" in plain
        assert f"|{condition['ppl']:,.3f}|" in plain
        assert f"|{condition['mean_loss']:.4f}|" in plain
    longest = record["conditions"][-3]
    assert (longest["attention"], longest["context"]) == ("full", 8192)
    assert f"|{longest['ppl']:.2f} at 8K|" in plain
    for name, value in record["model"]["adapter_sha256"].items():
        assert f"|model.adapter_sha256.{name}||{value}|" in plain
    assert f"|{record['provenance']['git_revision']}|" in plain


def test_same_inputs_same_bytes(tmp_path):
    arguments = [factory.write(tmp_path / name / "p.json", factory.retrieval((1024,), (0.0, 1.0), tasks=("passkey",)))
                 for name in "ab"]  # fmt: skip
    first, second = (write_report(gather(arguments), tmp_path / name).parent for name in ("first", "second"))
    names = sorted(path.name for path in first.iterdir())
    assert names == [REPORT_MARKER, "index.html", "retrieval-passkey.png"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_every_text_is_escaped(tmp_path):
    evil = '<script>alert("1")</script>&amp;\'"'
    about = factory.model(f"runs/{evil}")
    record = factory.perplexity((2048, 4096), about=about)
    record["provenance"]["git_revision"] = evil
    record["data"][evil] = evil
    record["protocol"]["name"] = evil
    factory.write(tmp_path / "a<b>&" / "p.json", record)
    factory.write(tmp_path / "plain" / "p.json", factory.longbench())
    text = write_report(gather([tmp_path / "a<b>&", tmp_path / "plain"]), tmp_path / "out").read_text()
    assert "<script" not in text
    assert "a<b>" not in text
    page = Page(text)
    assert "a<b>&" in page.of("h1")[0][1]
    assert text.count("&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;&amp;amp;&#39;&#34;") >= 5


def test_hashes_of_files_are_shortened_and_whole_below(tmp_path):
    predictions = factory.scored_topics()
    predictions["data"]["sha256"] = {"a.json": "aa" * 32, "b.json": "bb" * 32}
    factory.write(tmp_path / "x" / "topics.json", predictions)
    factory.write(tmp_path / "y" / "lm.json", factory.lm())
    text = write_report(gather([tmp_path / "x", tmp_path / "y"]), tmp_path / "out").read_text()
    shortened = {shown: attrs["title"] for attrs, shown in Page(text).of("abbr")}
    assert shortened["a.json aaaaaaaaaaaa, and 1 more"] == f"a.json {'aa' * 32}, b.json {'bb' * 32}"
    weights = f"hici_model.safetensors {'c4' * 6}, adapter_model.safetensors {'9e' * 6}"
    assert shortened[weights] == f"hici_model.safetensors {'c4' * 32}, adapter_model.safetensors {'9e' * 32}"
    assert shortened["a7" * 6] == "sha256:" + "a7" * 32
    facts = [text for _, text in Page(text).of("dd")]
    assert {"aa" * 32, "bb" * 32, "c4" * 32} <= set(facts)


def test_values_that_are_no_numbers_and_which_way_is_better(tmp_path):
    record = factory.lm()
    record["conditions"][0] |= {"value": None, "text": "nan", "standard_error": None}
    record["conditions"][2]["higher_is_better"] = False
    factory.write(tmp_path / "x" / "lm.json", record)
    text = re.sub(r"\s*<[^>]+>\s*", "|", write_report(gather([tmp_path / "x"]), tmp_path / "out").read_text())
    assert "|arc_easy||acc,none||nan|" in text
    assert "|hellaswag||acc_norm,none ↑||0.4301 ± 0.0049|" in text


def test_blocks_become_their_html():
    table = Table("c<p", ["x", "y<"], [["a", Cell("short", "whole<")], ["b&", "2"]], notes=["n>"])
    blocks = [Text("one"), Text("two", "note"), Heading("h"), table, Facts("f", [("n", "v<")]),
              Figure("fig", lambda narrow: None, "caption", 'al"t', table)]  # fmt: skip
    text = render_page("T", "L", [Part("A b", blocks)], {"fig": Picture(png(30, 20), png(5, 6))}, "made")
    page = Page(text)
    assert [(a.get("class"), t) for a, t in page.of("p")] == [
        ("lead", "L"), (None, "one"), ("note", "two"), ("caption", "c<p"), ("below", "n>"), ("caption", "c<p"),
        ("below", "n>"), (None, "made")]  # fmt: skip
    assert page.of("abbr")[0] == ({"title": "whole<"}, "short")
    assert [(a.get("class"), t) for a, t in page.of("th")][:4] == [
        (None, "x"),
        ("number", "y<"),
        (None, "a"),
        (None, "b&"),
    ]
    assert page.of("dd")[0][1] == "v<"
    image, source = page.of("img")[0][0], page.of("source")[0][0]
    assert (image["alt"], image["width"], image["height"]) == ('al"t', "30", "20")
    assert (source["media"], source["width"], source["height"]) == ("(max-width: 640px)", "5", "6")


def png(width, height):
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + width.to_bytes(4) + height.to_bytes(4)


# ---- the command


def run(capsys, *arguments):
    status = main(["report", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_command(small, capsys):
    status, out, err = run(capsys, small)
    assert (status, out, err) == (0, f"report: {small / 'report' / 'index.html'}\n", "")
    status, out, err = run(capsys, small)  # its own report is drawn anew, and is no result
    assert (status, err) == (0, "")
    factory.write(small / "more.json", factory.lm(factory.model("other")))
    assert run(capsys, small / "lm.json", small / "more.json", "--out", small.parent / "out")[0] == 0
    assert Page((small.parent / "out" / "index.html").read_text()).of("h1")[0][1] == "HiCI report: lm and more"
    assert sorted(path.name for path in small.parent.iterdir()) == ["out", "run"]  # no lock, no temporary


def test_a_report_with_other_files_in_it_is_left_alone(small, capsys):
    run(capsys, small)
    notes = small / "report" / "notes.txt"
    notes.write_text("precious")
    status, out, err = run(capsys, small)
    assert (status, out) == (2, "")
    assert "holds files that the report there did not write (notes.txt)" in err
    assert notes.read_text() == "precious"
    assert run(capsys, small, "--overwrite")[0] == 0
    assert not notes.exists()
    assert (small / "report" / "index.html").exists()


def test_where_no_report_may_be(small, capsys, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "index.html").write_text("precious")
    file = tmp_path / "file"
    file.write_text("")
    for arguments, message in (
        ([small, "--out", taken], f"{taken} holds no {REPORT_MARKER}, so it is no directory of this kind"),
        ([small, "--out", taken, "--overwrite"], f"{taken} holds no {REPORT_MARKER}"),
        ([small, "--out", file], f"{file} is a file, but a directory is to be written there"),
        ([small, "--out", file / "x"], "nothing can be written in"),
        ([small, "--out", small], f"{small} is or holds {small}, which is read"),
        ([small, "--out", tmp_path], f"{tmp_path} is or holds {small}, which is read"),
        ([small, taken], "2 results have no one place for the report; give --out DIR"),
        ([small / "lm.json"], "lm.json is a file, so there is no directory for the report yet; give --out DIR"),
        ([tmp_path / "gone"], "gone does not exist; give a result's JSON"),
    ):
        status, out, err = run(capsys, *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert message in err
    assert (taken / "index.html").read_text() == "precious"
    assert not (tmp_path / "gone").exists()


def test_an_error_while_drawing_leaves_the_earlier_report(small, capsys, monkeypatch):
    run(capsys, small)
    before = (small / "report" / "index.html").read_bytes()
    factory.write(small / "ppl.json", factory.perplexity((64,), windows=2))

    def fail(*args, **kwargs):
        raise ValueError("no ink")

    monkeypatch.setattr("hici.report.write.write_json", fail)
    assert run(capsys, small)[0] == 2
    assert (small / "report" / "index.html").read_bytes() == before
    assert sorted(path.name for path in small.iterdir()) == ["lm.json", "ppl.json", "report"]


def test_two_at_a_time(small, capsys):
    from hici.processes import only_run_in

    with only_run_in(small, ".report.lock"):
        status, _, err = run(capsys, small)
    assert status == 2
    assert f"another run is writing into {small}" in err
