#!/usr/bin/env python3
"""Drives a real `bdev-repl tgt` with SPDK's official client (package `spdk` of PyPI).

    VENV/bin/python tests/rpc_client.py target/debug/bdev-repl

Run it with the Python that has the package: the command `spdk-rpc` beside it is used too.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from spdk.rpc.client import JSONRPCClient, JSONRPCException

BINARY = Path(sys.argv[1]).resolve()
# Not resolved: the interpreter of a virtual environment is a link out of it.
SPDK_RPC = Path(sys.executable).absolute().parent / "spdk-rpc"
PLUGINS = Path(__file__).resolve().parent.parent / "python"
NQN = "nqn.2016-06.io.spdk:cnode1"
HOST = "nqn.2014-08.org.example:host1"
START_SECONDS = 20


class Target:
    """A target process; ends with SIGTERM and has to end well."""

    def __init__(self, folder, *flags, name="spdk", ready=True):
        self.socket = os.path.join(folder, name + ".sock")
        self.log = open(os.path.join(folder, name + ".log"), "w+", encoding="utf-8")
        command = [BINARY, "tgt", "-r", self.socket, *flags]
        self.process = subprocess.Popen(command, stderr=self.log)
        try:
            self.wait_for_socket()
            if ready:
                self.call("framework_wait_init")
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def wait_for_socket(self):
        give_up = time.monotonic() + START_SECONDS
        while not os.path.exists(self.socket):
            assert self.process.poll() is None, "the target ended: " + self.text()
            assert time.monotonic() < give_up, "no RPC socket: " + self.text()
            time.sleep(0.02)

    def text(self):
        self.log.flush()
        with open(self.log.name, encoding="utf-8") as log:
            return log.read()

    def call(self, method, **params):
        with JSONRPCClient(self.socket, timeout=START_SECONDS) as client:
            return client.call(method, params)

    def code(self, method, params=None):
        """Code of a call that has to fail; sent as it is, parameters that are empty too."""
        request = {"jsonrpc": "2.0", "id": 1, "method": method}
        if params is not None:
            request["params"] = params
        return self.raw(json.dumps(request).encode())["error"]["code"]

    def raw(self, request):
        """What is answered to these bytes; None if the connection is closed instead."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
            stream.settimeout(START_SECONDS)
            stream.connect(self.socket)
            stream.sendall(request)
            answer = b""
            while True:
                try:
                    piece = stream.recv(4096)
                except ConnectionResetError:
                    return None
                if not piece:
                    return None
                answer += piece
                assert answer.isascii()
                try:
                    return json.loads(answer)
                except ValueError:
                    pass

    def rpc(self, *arguments, text=None, fails=False):
        """The command of the package."""
        environment = dict(os.environ, PYTHONPATH=str(PLUGINS))
        command = [SPDK_RPC, "-s", self.socket, *arguments]
        result = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60,
                                env=environment, check=False,
                                stdin=subprocess.DEVNULL if text is None else None)
        assert (result.returncode != 0) == fails, (arguments, result)
        return result.stdout

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.ended()

    def ended(self):
        code = self.process.wait(START_SECONDS)
        assert code == 0, (code, self.text())
        assert not os.path.exists(self.socket)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if self.process.poll() is None:
            if kind is None:
                self.stop()
            else:
                print(self.text(), file=sys.stderr)
                self.process.kill()
                self.process.wait()
        self.log.close()


def image(folder, name):
    path = os.path.join(folder, name)
    with open(path, "wb") as file:
        file.truncate(16 << 20)
    return path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def set_up(target, folder):
    """One of everything that a configuration holds, by the command."""
    rpc = target.rpc
    assert rpc("bdev_malloc_create", "-b", "m0", "16", "512").strip() == "m0"
    assert rpc("bdev_aio_create", image(folder, "aio.img"), "a0", "4096").strip() == "a0"
    assert rpc("bdev_uring_create", image(folder, "uring.img"), "u0", "512").strip() == "u0"
    rpc("bdev_wait_for_examine")
    rpc("nvmf_create_transport", "-t", "TCP", "-q", "64", "-c", "8192")
    rpc("nvmf_create_subsystem", NQN, "-s", "SERIAL1", "-d", "a model", "-m", "8")
    rpc("nvmf_subsystem_add_host", NQN, HOST)
    rpc("nvmf_subsystem_add_ns", NQN, "a0", "-n", "3")
    port = free_port()
    rpc("nvmf_subsystem_add_listener", NQN, "-t", "tcp", "-a", "127.0.0.1", "-s", port, "-f", "ipv4")
    return port


def test_every_method_by_the_command(folder):
    with Target(folder, "-m", "[0,1]") as target:
        rpc = target.rpc
        assert "bdev_aio_create" in json.loads(rpc("rpc_get_methods"))
        assert "framework_start_init" not in json.loads(rpc("rpc_get_methods", "--current"))
        assert json.loads(rpc("spdk_get_version"))["version"]
        assert len(json.loads(rpc("framework_get_reactors"))["reactors"]) == 2
        names = [one["subsystem"] for one in json.loads(rpc("framework_get_subsystems"))]
        assert names == ["bdev", "nvmf"]
        rpc("log_set_print_level", "WARNING")
        assert json.loads(rpc("log_get_print_level")) == "WARNING"
        port = set_up(target, folder)
        assert [one["name"] for one in json.loads(rpc("bdev_get_bdevs"))] == ["m0", "a0", "u0"]
        assert json.loads(rpc("bdev_get_bdevs", "-b", "a0", "-t", "100"))[0]["claimed"] is True
        assert len(json.loads(rpc("bdev_get_iostat"))["bdevs"]) == 3
        assert len(json.loads(rpc("bdev_get_iostat", "--names", "m0", "-c"))["channels"]) == 2
        assert json.loads(rpc("nvmf_get_transports"))[0]["in_capsule_data_size"] == 8192
        shown = json.loads(rpc("nvmf_get_subsystems", NQN))[0]
        assert shown["namespaces"][0]["nsid"] == 3 and shown["hosts"] == [{"nqn": HOST}]
        assert json.loads(rpc("nvmf_subsystem_get_listeners", NQN))[0]["address"]["trsvcid"] == port
        assert json.loads(rpc("--plugin", "bdev_repl", "bdev_repl_get_volumes")) == []
        rpc("nvmf_subsystem_allow_any_host", "--allow-any-host", NQN)
        attach = ("-b", "N", "-t", "tcp", "-a", "127.0.0.1", "-s", port, "-f", "ipv4", "-n", NQN)
        with Target(folder, name="host") as host:
            assert host.rpc("bdev_nvme_attach_controller", *attach).strip() == "Nn3"
            assert json.loads(host.rpc("bdev_nvme_get_controllers"))[0]["ctrlrs"][0]["state"] == "enabled"
            assert host.code("bdev_nvme_detach_controller", {"name": "absent"}) == -19
            host.rpc("bdev_nvme_detach_controller", "N")
        rpc("nvmf_subsystem_remove_host", NQN, HOST)
        rpc("nvmf_subsystem_remove_ns", NQN, "3")
        rpc("nvmf_subsystem_remove_listener", NQN, "-t", "tcp", "-a", "127.0.0.1", "-s", port, "-f", "ipv4")
        rpc("nvmf_delete_subsystem", NQN)
        for kind, name in (("malloc", "m0"), ("aio", "a0"), ("uring", "u0")):
            rpc(f"bdev_{kind}_delete", name)
        assert json.loads(rpc("bdev_get_bdevs")) == []
        # Several calls from standard input, one after the other and as a batch.
        calls = "bdev_malloc_create -b x 1 512\nbdev_malloc_create -b y 1 512\n"
        assert rpc(text=calls).split() == ["x", "y"]
        assert rpc("-b", text="bdev_malloc_delete x\nbdev_malloc_delete y\n").split() == ["true", "true"]
        rpc("spdk_kill_instance", "SIGTERM")
        target.ended()


def test_a_saved_configuration_is_the_same_after_loading(folder):
    with Target(folder, name="first") as first:
        set_up(first, folder)
        saved = first.rpc("save_config")
    file = os.path.join(folder, "saved.json")
    Path(file).write_text(saved, encoding="utf-8")
    with Target(folder, name="loaded") as loaded:
        loaded.rpc("load_config", text=saved)
        assert loaded.rpc("save_config") == saved
    with Target(folder, "--wait-for-rpc", name="waiting", ready=False) as waiting:
        assert waiting.code("bdev_get_bdevs") == -1
        waiting.rpc("load_config", text=saved)
        assert waiting.rpc("save_config") == saved
        assert waiting.code("framework_start_init") == -1
    with Target(folder, "-c", file, name="from_file") as from_file:
        assert from_file.rpc("save_config") == saved


def test_a_configuration_of_spdk_tgt_loads_with_one_warning_an_option(folder):
    options = ["bdev_set_options", "bdev_nvme_set_options", "bdev_set_options", "sock_impl_set_options"]
    config = {"subsystems": [
        {"subsystem": "keyring", "config": None},
        {"subsystem": "bdev", "config": [{"method": name, "params": {"x": 1}} for name in options]},
    ]}
    file = os.path.join(folder, "spdk.json")
    Path(file).write_text(json.dumps(config), encoding="utf-8")
    with Target(folder, "-c", file) as target:
        assert len(re.findall("bdev_set_options", target.text())) == 1
    config["subsystems"][1]["config"].append({"method": "bdev_what_set_options", "params": {}})
    Path(file).write_text(json.dumps(config), encoding="utf-8")
    result = subprocess.run([BINARY, "tgt", "-r", os.path.join(folder, "x.sock"), "-c", file],
                            capture_output=True, text=True, timeout=START_SECONDS, check=False)
    assert result.returncode == 1
    assert file in result.stderr and "bdev_what_set_options" in result.stderr, result.stderr


def test_error_codes_and_the_wire(folder):
    with Target(folder) as target:
        code = target.code
        assert code("no_such_method") == -32601
        assert code("spdk_get_version", {}) == -32602
        assert code("bdev_get_bdevs", {"name": 1}) == -32603
        assert code("bdev_repl_promote", {}) == -32603
        assert code("bdev_repl_promote", {"name": "v", "colour": 1}) == -32603
        assert code("bdev_repl_create", {"name": "a b", "node_id": 1}) == -22
        assert code("bdev_repl_get_volumes", {"name": "absent"}) == -19
        target.call("bdev_malloc_create", name="m", num_blocks=64, block_size=512)
        assert code("bdev_malloc_create", {"name": "m", "num_blocks": 64, "block_size": 512}) == -17
        assert code("bdev_malloc_delete", {"name": "absent"}) == -19
        assert code("bdev_malloc_create", {"name": "n", "num_blocks": 64, "block_size": 500}) == -22
        assert code("bdev_aio_create", {"name": "a", "filename": "/nonexistent/x"}) == -2
        assert code("nvmf_delete_subsystem", {"nqn": NQN}) == -32602
        assert target.raw(b"[]")["error"]["code"] == -32600
        assert target.raw(b'{"jsonrpc":"1.0","method":"spdk_get_version","id":1}')["error"]["code"] == -32600
        assert target.raw(b"nonsense") is None
        assert target.raw(b'{"method":"' + b"x" * (256 << 10) + b'"}') is None
        # No answer to a call without an id: the next answer is that of the call after it.
        quiet = b'{"jsonrpc":"2.0","method":"spdk_get_version"}{"jsonrpc":"2.0","method":"no","id":7}'
        assert target.raw(quiet)["id"] == 7
        # Longer than one piece of the client, and not one character lost.
        name = "größe" * 2000
        try:
            target.call("bdev_get_bdevs", name=name)
            raise AssertionError("a bdev that is not there was found")
        except JSONRPCException as error:
            # The request and the answer are shown, each as JSON.
            assert error.message.count(json.dumps(name)[1:-1]) == 2, "the name came back changed"


def test_a_socket_in_use_is_refused_and_one_left_by_a_killed_target_is_replaced(folder):
    with Target(folder) as target:
        result = subprocess.run([BINARY, "tgt", "-r", target.socket], capture_output=True, text=True,
                                timeout=START_SECONDS, check=False)
        assert result.returncode == 1 and "in use" in result.stderr, result
        target.call("spdk_get_version")
        target.process.kill()
        target.process.wait()
        assert os.path.exists(target.socket)
    os.rename(os.path.join(folder, "spdk.log"), os.path.join(folder, "killed.log"))
    # The socket that was left is there from the beginning: wait until it answers.
    with Target(folder, ready=False) as target:
        give_up = time.monotonic() + START_SECONDS
        while True:
            try:
                target.call("framework_wait_init")
                break
            except JSONRPCException:
                assert time.monotonic() < give_up
                time.sleep(0.02)


def main():
    for name, test in sorted(globals().items()):
        if name.startswith("test_"):
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                test(folder)
            print(f"{name}: ok, {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
