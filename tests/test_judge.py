"""Reviews by a judge: a server on this machine that speaks OpenAI's protocol."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ferret_mlx.evaluate.cli import evaluate_main
from tests.evaluating import fails

openai = pytest.importorskip("openai")

CATEGORIES = ("refer_desc", "refer_reason", "ground_conv")


class StubJudge(ThreadingHTTPServer):
    """Answers with the given replies in order; None is a failure that may be repeated."""

    def __init__(self, replies):
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.replies, self.requests = list(replies), []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class StubHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        reply = self.server.replies.pop(0) if self.server.replies else None
        message = {"role": "assistant", "content": reply}
        content = {
            "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        }  # fmt: skip
        if reply is not None:
            self.server.requests.append(body)
        data = json.dumps(content).encode()
        self.send_response(503 if reply is None else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def judge():
    """Starts a server with such replies."""
    servers = []

    def start(replies):
        server = StubJudge(replies)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def words(evaluation, tmp_path):
    folder = evaluation / "ferret_bench"
    return [
        "ferret-bench", "--data", str(folder), "--score-only", "--output", str(tmp_path / "out"),
        "--answers", str(folder / "ferret_answers"), "--judge-model", "gpt-4-0314",
    ]  # fmt: skip


@pytest.fixture
def replies(evaluation):
    folder = evaluation / "ferret_bench"
    return [
        reply
        for category in CATEGORIES
        for reply in json.loads((folder / f"judge_replies_{category}.json").read_text())
    ]


def check_reviews(evaluation, folder):
    for category in CATEGORIES:
        name = f"review_{category}.jsonl"
        released = (evaluation / "ferret_bench" / "reviews" / name).read_text()
        assert (folder / name).read_text() == released


def test_requests_and_review_files_are_those_of_the_release(
    judge, words, replies, evaluation, tmp_path
):
    server = judge(replies)
    evaluate_main([*words, "--judge-url", server.url])
    released = json.loads((evaluation / "ferret_bench" / "expected_metrics.json").read_text())
    assert server.requests == [r for c in CATEGORIES for r in released[c]["requests"]]
    check_reviews(evaluation, tmp_path / "out" / "reviews")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["judge"] == "gpt-4-0314"
    assert results["figures"]["average"] == 64.6
    # Scored again, the results still say who judged.
    evaluate_main(words[: words.index("--judge-model")])
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results


def test_a_failing_judge_is_asked_again(judge, words, replies, evaluation, tmp_path):
    flaky = [reply for pair in zip([None] * len(replies), replies, strict=True) for reply in pair]
    evaluate_main([*words, "--judge-url", judge(flaky).url, "--judge-retries", "1"])
    check_reviews(evaluation, tmp_path / "out" / "reviews")


def test_a_lost_judge_loses_nothing(judge, words, replies, evaluation, tmp_path, capsys):
    """The rerun asks about the rest only; the released script skips by the number of lines."""
    server = judge(replies[:4])
    command = [*words, "--judge-url", server.url, "--judge-retries", "1"]
    assert "gave no reply" in fails(capsys, *command)
    reviews = tmp_path / "out" / "reviews"
    assert len((reviews / "review_refer_desc.jsonl").read_text().splitlines()) == 3
    with (reviews / "review_refer_reason.jsonl").open("a") as file:
        file.write('{"id": 2, "quest')  # cut while it was written
    rest = judge(replies[4:])
    evaluate_main([*words, "--judge-url", rest.url])
    assert len(rest.requests) == len(replies) - 4
    check_reviews(evaluation, reviews)


def test_an_unreachable_judge_is_one_line(judge, words, capsys):
    server = judge([])
    url = server.url
    server.shutdown()
    server.server_close()
    line = fails(capsys, *words, "--judge-url", url, "--judge-retries", "0")
    assert url in line and "gave no reply" in line


@pytest.mark.parametrize("url", ("http://localhost:port/v1", "http://[::1"))
def test_an_address_that_is_none_is_one_line(words, capsys, url):
    line = fails(capsys, *words, "--judge-url", url)
    assert f"--judge-url {url} is not an address" in line


def test_a_reply_that_cannot_be_asked_for_names_the_judge(words, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "kéy")  # no header can hold it
    line = fails(capsys, *words, "--judge-url", "http://127.0.0.1:9/v1")
    assert "The judge gpt-4-0314 at http://127.0.0.1:9/v1 gave no reply" in line


def test_reviews_of_two_judges_are_not_mixed(judge, words, replies, capsys):
    server = judge(replies)
    evaluate_main([*words, "--judge-url", server.url])
    other = [*words[:-1], "another-judge", "--judge-url", server.url]
    assert "scores of two judges cannot be compared" in fails(capsys, *other)


def test_reviews_of_other_answers_are_refused(judge, words, replies, evaluation, tmp_path, capsys):
    evaluate_main([*words, "--judge-url", judge(replies).url])
    answers = shutil.copytree(evaluation / "ferret_bench" / "ferret_answers", tmp_path / "answers")
    path = answers / "refer_reason" / "ferret_answer.jsonl"
    path.write_text(path.read_text().replace("it leans", "it falls"))
    changed = [*words, "--answers", str(answers), "--judge-url", judge([]).url]
    assert "reviews another answer to question 0" in fails(capsys, *changed)


def test_openai_without_a_key_is_one_line(words, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "OPENAI_API_KEY is not set" in fails(capsys, *words)


def test_a_missing_key_is_told_before_anything_is_asked(evaluation, tmp_path, monkeypatch, capsys):
    """Not after hours of answers."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    folder = evaluation / "ferret_bench"
    words = ["--images", str(folder / "images"), "--limit", "1", "--max-tokens", "1"]
    words += ["--output", str(tmp_path / "out"), "--judge-model", "gpt-4-0314"]
    line = fails(capsys, "ferret-bench", "--data", folder, *words)
    assert "OPENAI_API_KEY is not set" in line
    assert not (tmp_path / "out").exists()


def test_a_server_needs_the_name_of_a_judge(words, capsys):
    named = words[: words.index("--judge-model")]
    assert "add the judge's name" in fails(capsys, *named, "--judge-url", "http://localhost/v1")
