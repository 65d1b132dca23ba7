"""A package index on this machine that pip downloads from, and that misbehaves when it is told to."""

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
    """Serves `wheels`, a dictionary of name to bytes. Names in `cut` break off half way through their file."""

    def __init__(self, wheels):
        self.wheels = wheels
        self.cut = set()
        self.downloads = []  # names, in the order in which their files were asked for
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.strip("/").split("/")[-1]
                if self.path.startswith("/simple/") and name in index.wheels:
                    self.answer("text/html", f'<a href="/files/{name}-1.0-py3-none-any.whl">{name}</a>'.encode())
                elif self.path.startswith("/files/"):
                    index.downloads.append(name.split("-")[0])
                    self.answer("application/zip", index.wheels[name.split("-")[0]], name.split("-")[0] in index.cut)
                else:
                    self.send_error(404)

            def answer(self, kind, body, cut=False):
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:len(body) // 2] if cut else body)

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
