"A server on this machine that speaks as the Hub does, and lies as it is told; for lessons and tests."
import hashlib, json, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from hubcache import blob_name
from patience import PATIENCE

COMMIT = "5ca1ab1e" + "0" * 32
FILES = {"config.json": b'{"model_type": "clip"}', "model.safetensors": b"weights" * 1000}


class Answers(BaseHTTPRequestHandler):
    "What snapshot_download asks for, with lies in between."
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        server = self.server.lying
        path = urlsplit(self.path).path
        server.log.append((self.command, self.path))
        try:
            if path.startswith("/cdn/"): self.send(server.files["model.safetensors"], {})
            elif "/resolve/" in path: self.send_file(path.split("/resolve/")[1].split("/", 1)[1], server)
            elif "/discussions" in path: self.send_json(server.say("discussions", {"count": 0, "start": 0, "discussions": []}))
            elif "/tree/" in path: self.send_tree(server)
            else: self.send_info(server)
        except (BrokenPipeError, ConnectionResetError): pass  # whoever asked has had enough

    do_HEAD = do_GET

    def send_info(self, server):
        named = [{"rfilename": name, "size": len(data)} for name, data in server.files.items()]
        info = {"id": "shop/clip", "sha": server.say("commit", COMMIT), "siblings": server.say("siblings", named), "private": False}
        self.send_json(server.say("info", info))

    def send_tree(self, server):
        entries = [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
                   for name, data in server.files.items()]
        more = {"Link": f'<{server.address}{self.path}>; rel="next"'} if server.say("pages", False) else {}
        self.send_json(server.say("tree", entries), **more)

    def send_json(self, value, **headers):
        if value == "endless": return self.endless(b'"', b"x" * 65536)
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        if self.server.lying.say("drip", False): return self.endless(b"", b" ", pause=.2)
        self.send(data, {"Content-Type": "application/json", **headers})

    def send_file(self, name, server):
        if name not in server.files or name in server.say("absent", ()):
            return self.send(b"", {"X-Repo-Commit": server.say("missing_commit", COMMIT), "X-Error-Code": "EntryNotFound"}, 404)
        if server.say("redirect", None): return self.send(b"", {"X-Repo-Commit": COMMIT, "ETag": '"abc"', "Location": server.lies["redirect"]}, 302)
        data = server.files[name]
        if server.say("elsewhere", None) and name == "model.safetensors":
            place = server.address.replace("127.0.0.1", "localhost") + server.lies["elsewhere"]
            return self.send(b"", {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{blob_name(name, data)}"', "ETag": 'W/"1a/b+c="', "X-Linked-Size": len(data),
                                   "Location": place}, 302)
        if self.command == "GET" and server.say("file", None) == "endless": return self.endless(b"", b"x" * 65536)
        if self.command == "GET" and server.say("file", None) == "drip": return self.endless(b"", b"x", pause=.2)
        if self.command == "HEAD" and server.say("unsized", False): self.close_connection = True
        headers = {"X-Repo-Commit": server.say("file_commit", COMMIT), "ETag": f'"{server.say("etag", blob_name(name, data))}"',
                   **server.say("headers", {})}
        self.send(server.say("content", data) if self.command == "GET" else data, headers)

    def send(self, data, headers, status=200):
        self.send_response(self.server.lying.say("status", status))
        if "retry" in self.server.lying.lies: self.send_header("Retry-After", self.server.lying.lies["retry"])
        sized = {} if self.server.lying.say("unsized", False) and self.command == "HEAD" else {"Content-Length": len(data)}
        for key, value in {**sized, **headers}.items(): self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(data)

    def endless(self, start, piece, pause=0.):
        self.protocol_version, self.close_connection = "HTTP/1.0", True
        until = time.monotonic() + PATIENCE
        if self.server.lying.say("header_drip", False): self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        else:
            self.send_response(200)
            self.end_headers()
        self.wfile.write(start)
        while time.monotonic() < until and not self.server.lying.closing:
            self.wfile.write(piece)
            if pause: time.sleep(pause)

    def log_message(self, *_): pass


class Quiet(ThreadingHTTPServer):
    "Whoever asks may hang up."
    daemon_threads = True

    def handle_error(self, *_): pass


class LyingHub:
    "A Hub with one repository; `lies` are said instead of what is true."
    def __init__(self, lies):
        self.lies = lies
        self.files = lies.get("files", FILES)
        self.log = []
        self.closing = False

    def say(self, what, truth): return self.lies.get(what, truth)

    def __enter__(self):
        self.server = Quiet(("127.0.0.1", 0), Answers)
        self.server.lying = self
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing = True
        self.server.shutdown()
        self.server.server_close()
