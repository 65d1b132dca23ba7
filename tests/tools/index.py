"""A package index on this machine that pip downloads from, and that misbehaves when it is told to."""

import hashlib
import http.server
import io
import threading
import zipfile


def wheel(name, payload):
    """A wheel, version 1.0, that holds the file `payload` under data/part.bin."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("data/part.bin", payload)
        info = f"{name}-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return content.getvalue()


class Index:
    """Serves `wheels`, a dictionary of name to bytes.

    Names in `cut` break off half way through what they were asked for. Without `ranges` every answer is a whole file;
    without `hashes` the index doesn't tell what SHA-256 its files have.
    """

    def __init__(self, wheels):
        self.wheels = wheels
        self.cut = set()
        self.ranges = True
        self.hashes = True
        self.downloads = []  # (name, first byte asked for), in order
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.strip("/").split("/")[-1].split("-")[0]
                if name not in index.wheels:
                    self.send_error(404)
                elif self.path.startswith("/simple/"):
                    link = f"/files/{name}-1.0-py3-none-any.whl"
                    if index.hashes:
                        link += f"#sha256={hashlib.sha256(index.wheels[name]).hexdigest()}"
                    self.answer(200, "text/html", f'<a href="{link}">{name}-1.0-py3-none-any.whl</a>'.encode())
                else:
                    self.file(name, index.wheels[name])

            def file(self, name, whole):
                asked = self.headers.get("Range")
                first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and index.ranges else 0
                index.downloads.append((name, first))
                if first >= len(whole):
                    self.send_error(416)
                    return
                body = whole[first:]
                sent = body[: len(body) // 2] if name in index.cut else body
                self.answer(
                    206 if first else 200,
                    "application/zip",
                    sent,
                    len(body),
                    {"Content-Range": f"bytes {first}-{len(whole) - 1}/{len(whole)}"} if first else {},
                )

            def answer(self, status, kind, body, length=None, more=None):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                for header, value in (more or {}).items():
                    self.send_header(header, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_address[1]}/simple"

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
