"""A server of one's own for a measurement: what compare-drafts.py, compare-forms.py and compare-servers.py ask."""
import concurrent.futures
import json
import subprocess
import tempfile
import time
import urllib.request


class Server:
    def __init__(self, evop, options):
        self.data = tempfile.TemporaryDirectory()
        command = [evop, "serve", "--port", "0", "--admin-addr", "off", "--data-dir", self.data.name, *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.url = "http://" + json.loads(self.process.stdout.readline())["address"]
        while self.get("/ready") is None:
            time.sleep(0.1)
        self.model = json.loads(self.get("/v1/models"))["data"][0]["id"]

    def get(self, path):
        try:
            return urllib.request.urlopen(self.url + path).read().decode()
        except OSError:
            return None

    def answer(self, prompt, tokens, model=None):
        """The greedy answer's token ids, and the seconds that it took."""
        body = {"model": model or self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        request = urllib.request.Request(self.url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
        started = time.monotonic()
        ids = json.load(urllib.request.urlopen(request))["choices"][0]["token_ids"]
        return ids, time.monotonic() - started

    def answers(self, requests, tokens, at_once):
        """Of (prompt, model)s, in their order."""
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            return [ids for ids, _ in pool.map(lambda request: self.answer(request[0], tokens, request[1]), requests)]

    def metric(self, name):
        return sum(float(line.rsplit(" ", 1)[1]) for line in self.get("/metrics").splitlines() if line.startswith(name + "{"))

    def resident(self):
        """MB."""
        with open(f"/proc/{self.process.pid}/status", encoding="utf-8") as status:
            return int(status.read().split("VmRSS:")[1].split()[0]) * 1024 / 1e6

    def stop(self):
        self.process.terminate()
        self.process.wait()
