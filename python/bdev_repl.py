"""Plugin of SPDK's rpc.py (and of spdk-rpc) with the methods of bdev_repl.

    PYTHONPATH=python spdk-rpc --plugin bdev_repl bdev_repl_get_volumes

Uses nothing but Python's own modules and args.client.call, so it works with the client of every SPDK version.
"""

import argparse
import json


def _call(args, method, **params):
    """Calls a method with the parameters that were given."""
    return args.client.call(method, {name: value for name, value in params.items() if value is not None})


def _print(result):
    """Prints as rpc.py does: a lone string without quotes; nothing in a dry run or a batch."""
    if result is not None:
        print(json.dumps(result, indent=2).strip('"'))


def _true_if_set(flag):
    """Flags that are not set are left out, so that an option of a later version does no harm."""
    return True if flag else None


def _with_name(subparsers, method, text, call):
    p = subparsers.add_parser(method, help=text)
    p.add_argument("name", help="Name of the volume")
    p.set_defaults(func=call)
    return p


def _listen_address(args):
    if args.traddr is None and args.trsvcid is None:
        return None
    address = {"trtype": "TCP", "adrfam": args.adrfam, "traddr": args.traddr, "trsvcid": args.trsvcid}
    return {name: value for name, value in address.items() if value is not None}


def _ana_listener(text):
    """Takes a listener apart, written as SPDK's transport ids are: "traddr:10.0.0.1 trsvcid:4420 subnqn:nqn...."."""
    listener = {}
    for part in text.split():
        name, _, value = part.partition(":")
        name = "nqn" if name == "subnqn" else name
        if name not in ("nqn", "trtype", "adrfam", "traddr", "trsvcid", "anagrpid") or not value:
            raise ValueError(part)
        listener[name] = int(value) if name == "anagrpid" else value
    return listener


_ana_listener.__name__ = "listener ('traddr:ADDRESS trsvcid:PORT subnqn:NQN [anagrpid:N] [trtype:TCP|RDMA]')"


def _address(text):
    """An address and a port: 10.0.0.2:4430 or [fd00::2]:4430."""
    traddr, _, trsvcid = text.rpartition(":")
    if not traddr or not trsvcid:
        raise argparse.ArgumentTypeError(f"'{text}' is not ADDRESS:PORT")
    return {"traddr": traddr.strip("[]"), "trsvcid": trsvcid}


def _allowed_host(text):
    """A node and its keys: 1 or 1,psk=key0 or 1,dhchap_key=key1,dhchap_ctrlr_key=key2."""
    node_id, *keys = text.split(",")
    try:
        return {"node_id": int(node_id), **dict(key.split("=", 1) for key in keys)}
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not NODE_ID[,KIND=KEY]...") from None


def bdev_repl_create(args):
    _print(_call(args, "bdev_repl_create",
                 name=args.name,
                 node_id=args.node_id,
                 base_bdev=args.base_bdev,
                 uuid=args.uuid,
                 granularity_kb=args.granularity_kb,
                 peer_slots=args.peer_slots,
                 channel_slots=args.channel_slots,
                 al_extents=args.al_extents,
                 size_mb=args.size_mb,
                 data_offset=0 if args.in_place else None,
                 assume_clean=_true_if_set(args.assume_clean),
                 has_data=_true_if_set(args.has_data),
                 force=_true_if_set(args.force),
                 listen_address=_listen_address(args),
                 ana_listeners=args.ana_listener,
                 secure_channel=_true_if_set(args.secure_channel),
                 allowed_hosts=args.allowed_host,
                 register=args.register))


def bdev_repl_delete(args):
    _call(args, "bdev_repl_delete", name=args.name)


def bdev_repl_wipe(args):
    _call(args, "bdev_repl_wipe", base_bdev=args.base_bdev)


def bdev_repl_get_volumes(args):
    _print(_call(args, "bdev_repl_get_volumes", name=args.name))


def bdev_repl_attach(args):
    _call(args, "bdev_repl_attach", name=args.name, base_bdev=args.base_bdev)


def bdev_repl_detach(args):
    _call(args, "bdev_repl_detach", name=args.name)


def bdev_repl_add_peer(args):
    _call(args, "bdev_repl_add_peer",
          name=args.name,
          node_id=args.node_id,
          adrfam=args.adrfam,
          traddr=args.traddr,
          trsvcid=args.trsvcid,
          hdgst=_true_if_set(args.hdgst),
          ddgst=_true_if_set(args.ddgst),
          alternate_addresses=args.alternate_address,
          multipath=args.multipath,
          psk=args.psk,
          dhchap_key=args.dhchap_key,
          dhchap_ctrlr_key=args.dhchap_ctrlr_key,
          ctrlr_loss_timeout_sec=args.ctrlr_loss_timeout_sec,
          reconnect_delay_sec=args.reconnect_delay_sec,
          fast_io_fail_timeout_sec=args.fast_io_fail_timeout_sec,
          connect=False if args.no_connect else None)


def bdev_repl_remove_peer(args):
    _call(args, "bdev_repl_remove_peer", name=args.name, node_id=args.node_id)


def bdev_repl_connect(args):
    _call(args, "bdev_repl_connect",
          name=args.name,
          node_id=args.node_id,
          discard_my_data=_true_if_set(args.discard_my_data))


def bdev_repl_disconnect(args):
    _call(args, "bdev_repl_disconnect", name=args.name, node_id=args.node_id)


def bdev_repl_promote(args):
    _call(args, "bdev_repl_promote", name=args.name, force=_true_if_set(args.force))


def bdev_repl_demote(args):
    _call(args, "bdev_repl_demote", name=args.name)


def bdev_repl_invalidate(args):
    _call(args, "bdev_repl_invalidate", name=args.name)


def bdev_repl_pause_resync(args):
    _call(args, "bdev_repl_pause_resync", name=args.name)


def bdev_repl_resume_resync(args):
    _call(args, "bdev_repl_resume_resync", name=args.name)


def bdev_repl_set_options(args):
    _call(args, "bdev_repl_set_options",
          name=args.name,
          ping_interval_ms=args.ping_interval_ms,
          ping_timeout_ms=args.ping_timeout_ms,
          connect_interval_ms=args.connect_interval_ms,
          resync_rate_mb=args.resync_rate_mb,
          ana_listeners=[] if args.no_ana_listeners else args.ana_listener)


def spdk_rpc_plugin_initialize(subparsers):
    """Called by rpc.py: adds one sub-command a method."""

    p = _with_name(subparsers, "bdev_repl_create",
                   "Create a replicated volume, or bring back the one whose metadata is on the base bdev",
                   bdev_repl_create)
    p.add_argument("-n", "--node-id", type=int, required=True,
                   help="Id of this node, 0 to 7, different on each node of the volume")
    p.add_argument("-b", "--base-bdev", help="Name of the backing bdev; if it is not there yet, the volume is made when it appears")
    p.add_argument("-u", "--uuid", help="UUID of the volume, the same on all nodes. Default: derived from the name")
    p.add_argument("-g", "--granularity-kb", type=int,
                   help="What one bit of the bitmap stands for, in KiB: a power of two, 4 to 1024. Default: 4")
    p.add_argument("--peer-slots", type=int, help="Peers that the metadata has room for, 1 to 7. Default: 3")
    p.add_argument("--channel-slots", type=int,
                   help="Cores that may write: activity log rings in the metadata, 1 to 64. Default: 8")
    p.add_argument("--al-extents", type=int,
                   help="Extents of 4 MiB that one core may keep active, 7 to 1000: more make fewer metadata"
                        " writes and a longer resync after a crash. Default: 256")
    p.add_argument("--size-mb", type=int, help="Size of the volume in MiB. Default: what the base bdev has room for")
    p.add_argument("--in-place", action="store_true",
                   help="Take the base bdev over with its data where they are (data_offset 0); the metadata go to"
                        " its end, so what is there must not use that part")
    p.add_argument("--assume-clean", action="store_true",
                   help="The replicas already hold the same data: no first resync")
    p.add_argument("--has-data", action="store_true",
                   help="The base bdev already carries the data: UpToDate here, full resync to the peers")
    p.add_argument("--force", action="store_true", help="Go on although the base bdev carries something else")
    p.add_argument("-a", "--traddr", help="IP address on which the peers reach this node")
    p.add_argument("-s", "--trsvcid", help="Port on which the peers reach this node")
    p.add_argument("-f", "--adrfam", help="Address family: ipv4 or ipv6. Default: that of the address")
    p.add_argument("--ana-listener", action="append", type=_ana_listener, metavar="LISTENER",
                   help="Listener whose ANA state follows the role: 'traddr:ADDRESS trsvcid:PORT subnqn:NQN', and"
                        " 'anagrpid:N' unless it is the group of the volume's own namespace; may be given repeatedly")
    p.add_argument("--register", choices=["always", "on_promote"],
                   help="When the volume is a bdev. on_promote: while this node is Primary, so that logical volumes,"
                        " partitions and encryption on it come up there. Default: always")
    p.add_argument("-k", "--secure-channel", action="store_true", help="Peers connect by TLS only")
    p.add_argument("--allowed-host", type=_allowed_host, action="append", metavar="NODE_ID[,KIND=KEY]...",
                   help="Only these nodes may connect, with these keys of the keyring: kind is psk (TLS), dhchap_key or"
                        " dhchap_ctrlr_key (DH-HMAC-CHAP). Once for each node")

    _with_name(subparsers, "bdev_repl_delete",
               "Delete a volume; its data and metadata stay on the base bdev", bdev_repl_delete)

    p = subparsers.add_parser("bdev_repl_wipe", help="Overwrite the metadata that a deleted volume has left on a bdev")
    p.add_argument("base_bdev", help="Name of the bdev")
    p.set_defaults(func=bdev_repl_wipe)

    p = subparsers.add_parser("bdev_repl_get_volumes", help="Show all volumes, or one")
    p.add_argument("-b", "--name", help="Name of the volume")
    p.set_defaults(func=bdev_repl_get_volumes)

    p = _with_name(subparsers, "bdev_repl_attach", "Attach a backing bdev to a diskless volume", bdev_repl_attach)
    p.add_argument("base_bdev", help="Name of the backing bdev")

    _with_name(subparsers, "bdev_repl_detach",
               "Detach the backing bdev; the volume goes on diskless", bdev_repl_detach)

    p = _with_name(subparsers, "bdev_repl_add_peer",
                   "Make a peer known to a volume and start connecting to it", bdev_repl_add_peer)
    p.add_argument("-n", "--node-id", type=int, required=True, help="Id of the peer's node, 0 to 7")
    p.add_argument("-a", "--traddr", required=True, help="IP address on which the peer listens")
    p.add_argument("-s", "--trsvcid", required=True, help="Port on which the peer listens")
    p.add_argument("-f", "--adrfam", help="Address family: ipv4 or ipv6. Default: that of the address")
    p.add_argument("-e", "--hdgst", action="store_true", help="Enable TCP header digest")
    p.add_argument("-d", "--ddgst", action="store_true", help="Enable TCP data digest")
    p.add_argument("--alternate-address", type=_address, action="append", metavar="ADDRESS:PORT",
                   help="Another path to the same peer. Once for each")
    p.add_argument("-x", "--multipath", choices=["disable", "failover", "multipath"],
                   help="What becomes of several paths. Default: multipath")
    p.add_argument("-k", "--psk", help="Name of the key for TLS")
    p.add_argument("--dhchap-key", help="Name of the key for DH-HMAC-CHAP")
    p.add_argument("--dhchap-ctrlr-key", help="Name of the key by which the peer proves itself (DH-HMAC-CHAP)")
    p.add_argument("-l", "--ctrlr-loss-timeout-sec", type=int,
                   help="How long a path may be down before it is given up; -1: for ever. Default: 0, at once, and the"
                        " volume connects anew; with several paths: -1")
    p.add_argument("-o", "--reconnect-delay-sec", type=int,
                   help="Pause between two attempts to bring a path back. Default: 1 unless it is given up at once")
    p.add_argument("-u", "--fast-io-fail-timeout-sec", type=int,
                   help="How long commands wait for a path; 0: until it is given up. Default: as the pause")
    p.add_argument("--no-connect", action="store_true", help="Stay StandAlone until bdev_repl_connect")

    p = _with_name(subparsers, "bdev_repl_remove_peer", "Forget a peer of a volume", bdev_repl_remove_peer)
    p.add_argument("-n", "--node-id", type=int, required=True, help="Id of the peer's node")

    p = _with_name(subparsers, "bdev_repl_connect", "Connect to all peers of a volume, or one", bdev_repl_connect)
    p.add_argument("-n", "--node-id", type=int, help="Id of the peer's node. Default: all peers")
    p.add_argument("--discard-my-data", action="store_true",
                   help="After a split brain: give this node's changes up in favour of the peer's")

    p = _with_name(subparsers, "bdev_repl_disconnect",
                   "Disconnect from all peers of a volume, or one, and stay StandAlone", bdev_repl_disconnect)
    p.add_argument("-n", "--node-id", type=int, help="Id of the peer's node. Default: all peers")

    p = _with_name(subparsers, "bdev_repl_promote", "Make this node Primary of a volume", bdev_repl_promote)
    p.add_argument("--force", action="store_true", help="Even if the data here may not be the newest")

    _with_name(subparsers, "bdev_repl_demote", "Make this node Secondary of a volume", bdev_repl_demote)

    _with_name(subparsers, "bdev_repl_invalidate",
               "Declare the data here worth nothing: full resync from a peer", bdev_repl_invalidate)

    _with_name(subparsers, "bdev_repl_pause_resync", "Hold the resyncs of a volume", bdev_repl_pause_resync)

    _with_name(subparsers, "bdev_repl_resume_resync", "Let held resyncs of a volume go on", bdev_repl_resume_resync)

    p = _with_name(subparsers, "bdev_repl_set_options", "Change options of a volume", bdev_repl_set_options)
    p.add_argument("--ping-interval-ms", type=int, help="Silence after which the peer is asked whether it lives")
    p.add_argument("--ping-timeout-ms", type=int, help="Time without an answer after which the connection is lost")
    p.add_argument("--connect-interval-ms", type=int, help="Pause between two attempts to connect")
    p.add_argument("--resync-rate-mb", type=int, help="Limit of a resync to this node in MiB a second; 0 is none")
    group = p.add_mutually_exclusive_group()
    group.add_argument("--ana-listener", action="append", type=_ana_listener, metavar="LISTENER",
                       help="As for bdev_repl_create; takes the place of those before")
    group.add_argument("--no-ana-listeners", action="store_true", help="No listener follows the role any more")
