"""The app from outside: every endpoint with good and with hostile inputs, the file routes, and many callers at once."""

import http.client
import io
import json
import re
import struct
import threading
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from vision_attn.apps.web import TABS

pytest_plugins = "live_app"

gradio_client = pytest.importorskip("gradio_client")
REPOSITORY = Path(__file__).parents[1]
SECRET = REPOSITORY / "pyproject.toml"
PATIENCE = 300
GENERIC = "has not enabled verbose error reporting"  # what a caller is told of an error that has no words
TRIED = {"inputs": 0}


def png(width: int, height: int, fill: int = 200) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (fill, 30, 40)).save(file, "PNG")
    return file.getvalue()


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A PNG whose header promises more than the file holds."""
    header = b"IHDR" + struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    small = png(1, 1)
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


# Name of the uploaded file, bytes, and a part of the answer; None where it has to work.
PICTURES = {
    "mislabelled": ("a.png", jpeg, None),
    "no ending": ("picture", jpeg, None),
    "one pixel": ("a.png", lambda: png(1, 1), None),
    "one row": ("a.png", lambda: png(900, 1), None),
    "50 megapixels": ("a.png", lambda: png(7100, 7100), None),
    "400 megapixels": ("a.png", lambda: claiming(20000, 20000), "megapixels"),
    "empty": ("a.png", lambda: b"", "not a picture"),
    "text": ("a.png", lambda: b"hello world", "not a picture"),
    "cut off": ("a.png", lambda: png(300, 300)[:200], "broken or cut off"),
    "cut in half": ("a.jpg", lambda: jpeg()[: len(jpeg()) // 2], "broken or cut off"),
    "svg": ("a.svg", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "SVG"),
    "web page": ("a.png", lambda: b"<!DOCTYPE html><script>alert(1)</script>", "web page"),
    "broken video": ("a.mp4", lambda: b"\0\0\0\x20ftypisom" + b"\0" * 500, "video"),
    "pdf": ("a.png", lambda: b"%PDF-1.7 ", "PDF"),
}


# Public endpoint -> its tab. Their names are what other programs call: a new one is added here.
ENDPOINTS = {
    "/pattern": "patterns",
    "/backbones": "backbones",
    "/generate": "generate",
    "/ask": "ask",
    "/pope": "ask",
    "/results": "results",
}
SMALL = {"steps": 1, "frames": 5, "compare": False, "tokens": 4, "images": 5}  # where an endpoint has them: quick runs


@pytest.fixture(scope="module")
def client(live, tmp_path_factory):
    folder = tmp_path_factory.mktemp("downloads")
    yield gradio_client.Client(
        live.url, verbose=False, analytics_enabled=False, download_files=folder, httpx_kwargs={"timeout": PATIENCE}
    )
    print(f"{TRIED['inputs']} inputs and requests tried")


@pytest.fixture(scope="module")
def endpoints(client):
    return client.view_api(print_info=False, return_format="dict")["named_endpoints"]


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    path.write_bytes(png(96, 96))
    return path


def is_picture(parameter: dict) -> bool:
    return parameter["component"] == "Image"


def good(parameters: list[dict], picture: Path) -> dict:
    """A value for every input: its default, or a picture."""
    values = {}
    for each in parameters:
        if is_picture(each):
            values[each["parameter_name"]] = gradio_client.handle_file(picture)
        elif each["parameter_has_default"]:
            values[each["parameter_name"]] = each["parameter_default"]
        else:
            values[each["parameter_name"]] = each["example_input"]
    return {**values, **{key: value for key, value in SMALL.items() if key in values}}


def bad(parameter: dict) -> list:
    """Values that an input of this kind must not take, or must survive."""
    kind, component = parameter["type"], parameter["component"]
    between = re.search(r"between (\S+) and (\S+)", str(kind.get("description", "")))
    if component in ("Slider", "Number"):
        edges = [float(between[1]) - 1, float(between[2]) + 1] if between else [-1]
        return [*edges, 1e18, float("-1e18"), None]
    if "enum" in kind:
        return ["none of these", "", None]
    if component == "Textbox":
        return [
            "",
            " \n",
            "x" * 20000,
            "\0\u202e\U0001f600</textarea><script>alert(1)</script>",
            "../../etc/passwd",
            None,
        ]
    if is_picture(parameter):
        return [None]
    return [None]


def call(client, endpoint: str, values: dict) -> str:
    """Empty when it worked, else the error that the caller gets."""
    TRIED["inputs"] += 1
    try:
        client.submit(api_name=endpoint, **values).result(timeout=PATIENCE)
        return ""
    except gradio_client.exceptions.AppError as error:
        return str(error)


def comparable(answer) -> object:
    """An answer, with the bytes of its files in the place of their names."""
    if isinstance(answer, (list, tuple)):
        return [comparable(each) for each in answer]
    if isinstance(answer, dict):
        return {key: comparable(value) for key, value in answer.items()}
    return Path(answer).read_bytes() if isinstance(answer, str) and Path(answer).is_absolute() else answer


def alive(client) -> None:
    httpx.get(f"{client.src}config", timeout=PATIENCE).raise_for_status()


def test_every_tab_has_endpoints_and_they_are_the_public_ones(endpoints):
    assert sorted(endpoints) == sorted(ENDPOINTS)
    assert set(ENDPOINTS.values()) == set(TABS)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_good_inputs(client, endpoints, picture, endpoint, live):
    assert call(client, endpoint, good(endpoints[endpoint]["parameters"], picture)) == ""
    assert not live.failures


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one", "every"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_hostile_inputs_are_answered_in_words(client, endpoints, picture, endpoint, every, live):
    """Every value that an input should not get; without the slow tests one for each input, in turns."""
    parameters = endpoints[endpoint]["parameters"]
    values = good(parameters, picture)
    for number, each in enumerate(parameters):
        for value in bad(each) if every else [bad(each)[number % len(bad(each))]]:
            told = call(client, endpoint, {**values, each["parameter_name"]: value})
            what = f"{each['parameter_name']}={str(value)[:40]!r}: {told}"
            assert "Traceback" not in told and "object has no attribute" not in told, what
            assert value is None or GENERIC not in told, what
            assert not live.failures, what
    alive(client)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_all_kinds(client, endpoints, picture, tmp_path, name, live):
    file, make, refusal = PICTURES[name]
    path = tmp_path / file
    path.write_bytes(make())
    for endpoint, described in endpoints.items():
        parameters = described["parameters"]
        if any(map(is_picture, parameters)):
            told = call(client, endpoint, good(parameters, path))
            assert (refusal in told) if refusal else told == "", f"{endpoint}: {told}"
            assert str(live.folder) not in told, "a path of the server"
    assert not live.failures


def raw(client, method: str, target: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
    """A request that no library tidies up on its way."""
    TRIED["inputs"] += 1
    place = urlsplit(client.src)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=PATIENCE)
    try:
        connection.putrequest(method, target, skip_accept_encoding=True)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


WALKS = [
    "/etc/passwd",
    "//etc/passwd",
    "../../../../../../etc/passwd",
    "..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "%252e%252e%252f%252e%252e%252fetc%252fpasswd",
    "....//....//....//etc/passwd",
    "..\\..\\..\\..\\etc\\passwd",
    "/etc/passwd%00.png",
    "/proc/self/environ",
    "/proc/self/cwd/../../../etc/passwd",
    "file:///etc/passwd",
    "C:\\Windows\\win.ini",
    str(SECRET),
    str(REPOSITORY / "apps" / "cli.py"),
    f"{REPOSITORY}/apps/web/../../pyproject.toml",
    "~/.bashrc",
    "pyproject.toml",
    "%0d%0aSet-Cookie:%20a=b",
    "x" * 6000,
]
ROUTES = ["/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/", "/svelte/", "/gradio_api/proxy="]


@pytest.mark.parametrize("route", ROUTES)
def test_no_file_of_the_machine_is_served(client, route):
    for walk in WALKS:
        status, answer = raw(client, "GET", route + walk)
        assert b"root:" not in answer and b"[project]" not in answer and b"import click" not in answer, walk
        assert status in {302, 307, 400, 401, 403, 404, 405, 414, 422, 500}, (walk, status)
    for url in ("http://169.254.169.254/latest/meta-data", f"{client.src}config", "https://example.com/"):
        status, answer = raw(client, "GET", route + url)
        assert status >= 300 and b"components" not in answer, url
    alive(client)


def test_files_of_the_server_are_no_inputs(client, endpoints, tmp_path, live):
    """A program that names a file, and does not say that it is one, gets nothing of it either."""
    private = tmp_path / "private.png"
    private.write_bytes(png(64, 64))
    taking = [name for name, each in endpoints.items() if any(map(is_picture, each["parameters"]))]
    assert taking
    for endpoint in taking:
        parameters = endpoints[endpoint]["parameters"]
        for path in (private, SECRET, "/etc/passwd", "../../../etc/passwd", "", "http://127.0.0.1:1/a.png", "\0"):
            for named in ({}, {"meta": {"_type": "gradio.FileData"}}, {"url": "file:///etc/passwd"}):
                values = good([each for each in parameters if not is_picture(each)], private)
                stolen = {"path": str(path), **named}
                data = [values.get(each["parameter_name"], stolen) for each in parameters]
                body = json.dumps({"data": data}).encode()
                target = f"/gradio_api/call{endpoint}"
                status, answer = raw(client, "POST", target, body, Content_Type="application/json")
                if status == 200:
                    status, answer = raw(client, "GET", f"{target}/{json.loads(answer)['event_id']}")
                    assert b"event: error" in answer, (path, named, answer[:200])
                assert b"root:" not in answer and b"[project]" not in answer
    assert not live.failures


def multipart(name: str, content: bytes) -> tuple[bytes, str]:
    head = f'--line\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    return head + content + b"\r\n--line--\r\n", "multipart/form-data; boundary=line"


UPLOADS = [
    *("../../evil.png", "..\\..\\evil.png", "/etc/evil.png", "evil%00.png", "%2e%2e%2fevil.png", "a/b/c.png"),
    *("x" * 3000 + ".png", "", ".", "..", "a\tb", "\u202egnp.evil", "con", "-rf"),
]


def test_uploads_stay_in_their_folder(client, live):
    for name in UPLOADS:
        body, kind = multipart(name, png(4, 4))
        status, answer = raw(client, "POST", "/gradio_api/upload", body, Content_Type=kind)
        assert status in {200, 400, 422, 500}, (name, status)
        if status == 200:
            for path in map(Path, json.loads(answer)):
                assert live.folder in path.resolve().parents and ".." not in path.parts, (name, path)
    outside = [path for parent in (live.folder.parent, Path("/etc")) for path in parent.glob("*evil*")]
    assert not outside
    alive(client)


def test_too_large_uploads_are_refused(client, live):
    before = sum(path.stat().st_size for path in live.folder.rglob("*") if path.is_file())
    body, kind = multipart("large.png", png(4, 4) + bytes(31 << 20))
    status, answer = raw(client, "POST", "/gradio_api/upload", body, Content_Type=kind)
    assert status == 413, (status, answer)
    after = sum(path.stat().st_size for path in live.folder.rglob("*") if path.is_file())
    assert after - before < 1 << 20, "the refused file stayed on the disk"


@pytest.mark.parametrize("body", [b"", b"hello", b"--line\r\n", b"\xff" * 100], ids=["empty", "text", "cut", "bytes"])
def test_broken_requests_are_refused(client, body):
    for kind in ("multipart/form-data; boundary=line", "multipart/form-data", "application/json", "text/plain"):
        for method, target in (
            ("POST", "/gradio_api/upload"),
            ("POST", "/gradio_api/queue/join"),
            ("POST", f"/gradio_api/call{next(iter(ENDPOINTS))}"),
            ("POST", "/gradio_api/call/none"),
            ("POST", "/gradio_api/run/none"),
            ("POST", "/gradio_api/cancel"),
            ("POST", "/gradio_api/component_server"),
            ("GET", "/gradio_api/queue/data"),
        ):
            status, answer = raw(client, method, target, body, Content_Type=kind)
            assert status >= 400 or answer == b"[]", (target, status)  # no file was sent, none is kept
            assert b"Traceback" not in answer and b"site-packages" not in answer, target
    alive(client)


def test_the_queue_cannot_be_passed_by(client, endpoints):
    for endpoint in endpoints:
        status, _ = raw(client, "POST", f"/gradio_api/run{endpoint}", b'{"data": []}', Content_Type="application/json")
        assert status >= 400


def test_fifty_callers_at_once(client, endpoints, picture, live):
    """All get their own answer: none waits for ever, none gets that of another.

    They ask for different things, because Gradio writes equal pictures to one file, where a reader may meet a writer.
    """
    values = [
        {**good(endpoints["/pattern"]["parameters"], picture), "grid": f"{8 + n},9", "query": ""} for n in range(50)
    ]
    said: list = [None] * 50

    def ask(number: int) -> None:
        said[number] = client.submit(api_name="/pattern", **values[number]).result(timeout=PATIENCE)

    callers = [threading.Thread(target=ask, args=(number,)) for number in range(50)]
    for each in callers:
        each.start()
    for each in callers:
        each.join(PATIENCE)
    for number, answer in enumerate(said):
        assert answer is not None and f"on {8 + number} x 9 tokens" in answer[-1]
    for number in range(0, 50, 10):
        assert comparable(said[number]) == comparable(client.predict(api_name="/pattern", **values[number]))
    assert not live.failures
