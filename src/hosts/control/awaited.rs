//! Volumes that were asked for before their backing bdev was there: what is asked of them meanwhile, how they are
//! reported and saved, and what is left to be asked once they have been made.
//! Called by the hosts that serve volumes, on the core of the managers. Must not know any host.

use serde_json::{Value, json};
use uuid::Uuid;

use super::report::{generation, options_report};
use super::{config, order, refusal};
use crate::engine::manager::Options;
use crate::engine::meta::format::volume_uuid_of_name;
use crate::engine::meta::generation::NONE;
use crate::engine::peer::state::{ConnState, DiskState, Role};
use crate::rpc::volume::{
    AddPeer, CreateVolume, GenerationsReport, PeerReport, VolumeReport, VolumeRequest,
};
use crate::rpc::{Reply, RpcError};

/// The volumes of a node that wait, in the order in which they were asked for.
#[derive(Default, Debug)]
pub struct AwaitedVolumes(Vec<Awaited>);

#[derive(Debug)]
struct Awaited {
    create: CreateVolume,
    options: Options,
    peers: Vec<AddPeer>,
    stage: Stage,
}

#[derive(Debug, PartialEq)]
enum Stage {
    /// The backing bdev is not there.
    Waiting,
    /// It is there, and the volume is being made.
    Making,
    /// It was there, and did not become a volume. Tried again when it has gone and come back.
    Refused(RpcError),
}

/// What becomes of a request.
#[derive(Debug)]
pub enum Turn {
    /// It is not for a volume that waits.
    Other(VolumeRequest),
    /// The volume is being made: soon one can say.
    Later(VolumeRequest),
    Answered(Result<Value, RpcError>),
}

impl AwaitedVolumes {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Remembers a volume whose backing bdev is not there.
    ///
    /// # Errors
    /// Another volume waits for it, or it was to be overwritten whatever it carries.
    pub fn defer(&mut self, create: CreateVolume) -> Result<(), RpcError> {
        let Some(base) = create.base_bdev.as_deref() else {
            return Err(refusal::needs_base_bdev());
        };
        if create.force {
            return Err(refusal::force_is_for_now(base));
        }
        let same = |other: &&Awaited| other.create.base_bdev.as_deref() == Some(base);
        if let Some(other) = self.0.iter().find(same) {
            return Err(refusal::awaited(base, &other.create.name));
        }
        tracing::info!(
            "volume '{}' waits for its backing bdev {base}: it is made when that appears",
            create.name
        );
        self.0.push(Awaited {
            create,
            options: Options::default(),
            peers: Vec::new(),
            stage: Stage::Waiting,
        });
        Ok(())
    }

    /// Whether a volume of this name waits.
    pub fn has(&self, name: &str) -> bool {
        self.named(name).is_some()
    }

    /// Whether a volume is being made on one of the bdevs that `is_it` knows by a name.
    pub fn is_making_on(&self, is_it: impl Fn(&str) -> bool) -> bool {
        let mut making = self.0.iter().filter(|own| own.stage == Stage::Making);
        making.any(|own| is_it(own.base()))
    }

    fn named(&self, name: &str) -> Option<&Awaited> {
        self.0.iter().find(|own| own.create.name == name)
    }

    /// The next volume whose backing bdev is there now; it is to be made, and then [`AwaitedVolumes::ended`].
    pub fn due(&mut self, is_there: impl Fn(&str) -> bool) -> Option<CreateVolume> {
        for own in &mut self.0 {
            match (&own.stage, is_there(own.base())) {
                (Stage::Waiting, true) => {
                    own.stage = Stage::Making;
                    return Some(own.create.clone());
                }
                (Stage::Refused(_), false) => own.stage = Stage::Waiting,
                _ => {}
            }
        }
        None
    }

    /// A volume has been made, or not. Returns what it is to be asked now.
    pub fn ended(&mut self, name: &str, outcome: Result<(), RpcError>) -> Vec<VolumeRequest> {
        let Some(position) = self.0.iter().position(|own| own.create.name == name) else {
            return Vec::new();
        };
        match outcome {
            Ok(()) => self.0.remove(position).follow_up(),
            Err(error) => {
                let own = &mut self.0[position];
                tracing::error!(
                    "volume '{name}' cannot be made, though its backing bdev {} is there: {}",
                    own.base(),
                    error.message
                );
                own.stage = Stage::Refused(error);
                Vec::new()
            }
        }
    }

    /// Answers a request for a volume that waits.
    pub fn request(&mut self, request: VolumeRequest) -> Turn {
        let Some(name) = name_of(&request) else {
            return Turn::Other(request);
        };
        let Some(position) = self.0.iter().position(|own| own.create.name == name) else {
            return Turn::Other(request);
        };
        if self.0[position].stage == Stage::Making {
            return Turn::Later(request);
        }
        if matches!(request, VolumeRequest::Delete { .. }) {
            self.0.remove(position);
            return Turn::Answered(Ok(json!(true)));
        }
        let answer = self.0[position].request(request);
        Turn::Answered(answer.map(|()| json!(true)))
    }

    /// The reports of all, or of the one named.
    pub fn reports(&self, name: Option<&str>) -> impl Iterator<Item = VolumeReport> {
        self.0
            .iter()
            .filter(move |own| name.is_none_or(|name| name == own.create.name))
            .map(Awaited::report)
    }

    /// The calls that make a node wait again as it does.
    pub fn calls(&self) -> Vec<VolumeRequest> {
        let calls = self.0.iter().map(|own| {
            let create = VolumeRequest::Create(own.create.clone());
            std::iter::once(create).chain(own.clone_follow_up())
        });
        calls.flatten().collect()
    }

    /// The node goes down.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

/// Of which volume a request is; none if it is of no single one, or asks for what is reported together.
fn name_of(request: &VolumeRequest) -> Option<&str> {
    match request {
        VolumeRequest::Wipe { .. } | VolumeRequest::GetVolumes { .. } => None,
        VolumeRequest::Create(create) => Some(&create.name),
        VolumeRequest::AddPeer(peer) => Some(&peer.name),
        VolumeRequest::SetOptions(options) => Some(&options.name),
        VolumeRequest::Delete { name }
        | VolumeRequest::Attach { name, .. }
        | VolumeRequest::Detach { name }
        | VolumeRequest::RemovePeer { name, .. }
        | VolumeRequest::Connect { name, .. }
        | VolumeRequest::Disconnect { name, .. }
        | VolumeRequest::Promote { name, .. }
        | VolumeRequest::Demote { name }
        | VolumeRequest::Invalidate { name }
        | VolumeRequest::PauseResync { name }
        | VolumeRequest::ResumeResync { name } => Some(name),
    }
}

impl Awaited {
    fn base(&self) -> &str {
        self.create.base_bdev.as_deref().unwrap_or_default()
    }

    /// What a saved configuration may ask is remembered; the rest needs the disk.
    fn request(&mut self, request: VolumeRequest) -> Result<(), RpcError> {
        match request {
            VolumeRequest::Create(create) => Err(refusal::volume_exists(&create.name)),
            VolumeRequest::SetOptions(wanted) => {
                self.options = order::options(&wanted, self.options);
                if let Some(listeners) = wanted.ana_listeners {
                    self.create.ana_listeners = listeners;
                }
                Ok(())
            }
            VolumeRequest::AddPeer(peer) => self.add_peer(peer),
            VolumeRequest::RemovePeer { node_id, .. } => {
                self.peer(node_id)?;
                self.peers.retain(|peer| peer.node_id != node_id);
                Ok(())
            }
            VolumeRequest::Connect {
                node_id,
                discard_my_data: false,
                ..
            } => self.want(node_id, true),
            VolumeRequest::Disconnect { node_id, .. } => self.want(node_id, false),
            _ => Err(refusal::waits(&self.create.name, self.base())),
        }
    }

    fn add_peer(&mut self, peer: AddPeer) -> Result<(), RpcError> {
        let node_id = peer.node_id;
        if node_id == self.create.node_id {
            return Err(refusal::own_node_id(node_id));
        }
        if self.peer(node_id).is_ok() {
            return Err(refusal::peer_exists(node_id));
        }
        self.peers.push(peer);
        Ok(())
    }

    fn peer(&mut self, node_id: u8) -> Result<&mut AddPeer, RpcError> {
        let mut peers = self.peers.iter_mut();
        let found = peers.find(|peer| peer.node_id == node_id);
        found.ok_or_else(|| refusal::no_peer(node_id))
    }

    fn want(&mut self, node_id: Option<u8>, connect: bool) -> Result<(), RpcError> {
        match node_id {
            Some(node_id) => self.peer(node_id)?.connect = connect,
            None => self
                .peers
                .iter_mut()
                .for_each(|peer| peer.connect = connect),
        }
        Ok(())
    }

    fn follow_up(self) -> Vec<VolumeRequest> {
        self.clone_follow_up().collect()
    }

    fn clone_follow_up(&self) -> impl Iterator<Item = VolumeRequest> {
        let options = config::changed_options(&self.create.name, self.options);
        let peers = self.peers.iter().cloned().map(VolumeRequest::AddPeer);
        options.into_iter().chain(peers)
    }

    fn report(&self) -> VolumeReport {
        let create = &self.create;
        let uuid = create.uuid;
        VolumeReport {
            name: create.name.clone(),
            uuid: uuid.unwrap_or_else(|| Uuid::from_bytes(volume_uuid_of_name(&create.name))),
            node_id: create.node_id,
            role: Role::Secondary.name().to_owned(),
            disk: match self.stage {
                Stage::Making => DiskState::Attaching,
                Stage::Waiting | Stage::Refused(_) => DiskState::Diskless,
            }
            .name()
            .to_owned(),
            suspended: false,
            block_size: 0,
            num_blocks: 0,
            granularity: create.granularity_kb << 10,
            base_bdev: create.base_bdev.clone(),
            listen_address: None,
            generations: GenerationsReport {
                current: generation(NONE),
                history: Vec::new(),
            },
            activity_log: None,
            options: options_report(self.options),
            peers: self.peers.iter().enumerate().map(peer).collect(),
            last_error: match &self.stage {
                Stage::Making => None,
                Stage::Waiting => Some(format!(
                    "bdev {} is not there yet: the volume is made when it appears",
                    self.base()
                )),
                Stage::Refused(error) => Some(format!(
                    "bdev {} is there, but the volume cannot be made on it: {}; delete the volume, or make the bdev \
                     again when that is mended",
                    self.base(),
                    error.message
                )),
            },
        }
    }
}

fn peer((slot, peer): (usize, &AddPeer)) -> PeerReport {
    PeerReport {
        node_id: peer.node_id,
        slot: slot as u8,
        address: peer.address.to_string(),
        connection: ConnState::StandAlone.name().to_owned(),
        role: Role::Unknown.name().to_owned(),
        disk: DiskState::DUnknown.name().to_owned(),
        bitmap_generation: generation(NONE),
        out_of_sync_bytes: 0,
        resync: None,
        last_error: None,
    }
}

/// For what was asked of a volume while it was awaited: whoever asked has had an answer, so a failure goes to the log.
pub fn logged(volume: &str) -> Reply {
    let volume = volume.to_owned();
    Reply::new(move |outcome| {
        if let Err(error) = outcome {
            tracing::error!(
                "volume '{volume}' lacks what was asked for: {}",
                error.message
            );
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(method: &str, mut params: Value) -> VolumeRequest {
        params["name"] = json!("v");
        VolumeRequest::parse(method, Some(params)).unwrap()
    }

    fn create(more: Value) -> CreateVolume {
        let mut params = json!({"node_id": 1, "base_bdev": "b"});
        for (key, value) in more.as_object().unwrap() {
            params[key] = value.clone();
        }
        match parsed("bdev_repl_create", params) {
            VolumeRequest::Create(create) => create,
            other => panic!("{other:?}"),
        }
    }

    fn waiting() -> AwaitedVolumes {
        let mut awaited = AwaitedVolumes::default();
        awaited.defer(create(json!({}))).unwrap();
        awaited
    }

    fn answer(awaited: &mut AwaitedVolumes, method: &str, params: Value) -> Result<(), i32> {
        match awaited.request(parsed(method, params)) {
            Turn::Answered(answer) => answer.map(|_| ()).map_err(|error| error.code),
            other => panic!("{other:?}"),
        }
    }

    fn peer(node_id: u8, connect: bool) -> Value {
        json!({"node_id": node_id, "traddr": "10.0.0.2", "trsvcid": 4420, "psk": "k", "connect": connect})
    }

    fn report(awaited: &AwaitedVolumes) -> VolumeReport {
        awaited.reports(Some("v")).next().unwrap()
    }

    #[test]
    fn what_is_asked_while_it_waits_is_saved_and_asked_again_when_it_has_been_made() {
        let mut awaited = waiting();
        let options = json!({"resync_rate_mb": 7});
        answer(&mut awaited, "bdev_repl_set_options", options.clone()).unwrap();
        for (node_id, connect) in [(2, true), (3, true), (4, true)] {
            let peer = peer(node_id, connect);
            answer(&mut awaited, "bdev_repl_add_peer", peer).unwrap();
        }
        let three = || json!({"node_id": 3});
        answer(&mut awaited, "bdev_repl_disconnect", three()).unwrap();
        answer(&mut awaited, "bdev_repl_remove_peer", json!({"node_id": 4})).unwrap();
        assert_eq!(report(&awaited).peers.len(), 2);
        assert_eq!(report(&awaited).options.resync_rate_mb, 7);

        let saved = awaited.calls();
        let mut loaded = AwaitedVolumes::default();
        for request in saved.clone() {
            match loaded.request(request) {
                Turn::Other(VolumeRequest::Create(create)) => loaded.defer(create).unwrap(),
                Turn::Answered(answer) => assert_eq!(answer, Ok(json!(true))),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(loaded.calls(), saved);

        assert_eq!(awaited.due(|base| base == "b"), Some(create(json!({}))));
        let left = awaited.ended("v", Ok(()));
        assert_eq!(left[..], saved[1..]);
        let [
            VolumeRequest::SetOptions(_),
            VolumeRequest::AddPeer(two),
            VolumeRequest::AddPeer(three),
        ] = &left[..]
        else {
            panic!("{left:?}");
        };
        assert_eq!((two.node_id, two.connect), (2, true));
        assert_eq!((three.node_id, three.connect), (3, false));
        assert_eq!(two.transport.keys.psk.as_deref(), Some("k"));
        assert!(awaited.is_empty() && awaited.calls().is_empty());
    }

    #[test]
    fn a_volume_is_made_once_for_each_time_that_its_bdev_appears() {
        let mut awaited = waiting();
        assert_eq!(report(&awaited).disk, "Diskless");
        assert!(
            report(&awaited)
                .last_error
                .unwrap()
                .contains("bdev b is not there")
        );
        assert_eq!(awaited.due(|_| false), None);
        assert!(awaited.due(|_| true).is_some());
        assert_eq!(awaited.due(|_| true), None, "it is being made");
        assert_eq!(report(&awaited).disk, "Attaching");
        assert!(
            awaited.is_making_on(|base| base == "b") && !awaited.is_making_on(|base| base == "c")
        );
        let asked = parsed("bdev_repl_delete", json!({}));
        assert!(matches!(awaited.request(asked), Turn::Later(_)));

        awaited.ended("v", Err(RpcError::invalid("it is too small")));
        let refused = report(&awaited);
        assert_eq!(
            (refused.disk.as_str(), refused.base_bdev.as_deref()),
            ("Diskless", Some("b"))
        );
        assert!(refused.last_error.unwrap().contains("it is too small"));
        assert_eq!(awaited.due(|_| true), None, "it is still the same bdev");
        assert_eq!(awaited.due(|_| false), None);
        assert!(awaited.due(|_| true).is_some(), "it has come back");
        awaited.ended("v", Ok(()));
        assert!(awaited.reports(None).next().is_none());
    }

    #[test]
    fn what_needs_the_disk_or_contradicts_is_refused_and_a_deleted_one_is_forgotten() {
        let mut awaited = waiting();
        answer(&mut awaited, "bdev_repl_add_peer", peer(2, true)).unwrap();
        for (method, params, code) in [
            (
                "bdev_repl_create",
                json!({"node_id": 1, "base_bdev": "c"}),
                -17,
            ),
            ("bdev_repl_add_peer", peer(2, true), -17),
            ("bdev_repl_add_peer", peer(1, true), -22),
            ("bdev_repl_remove_peer", json!({"node_id": 5}), -19),
            ("bdev_repl_connect", json!({"node_id": 5}), -19),
            ("bdev_repl_connect", json!({"discard_my_data": true}), -16),
            ("bdev_repl_promote", json!({}), -16),
            ("bdev_repl_attach", json!({"base_bdev": "c"}), -16),
        ] {
            assert_eq!(answer(&mut awaited, method, params), Err(code), "{method}");
        }
        let forced = create(json!({"base_bdev": "c", "force": true}));
        assert_eq!(awaited.defer(forced).unwrap_err().code, -19);
        let mut second = create(json!({}));
        second.name = "w".into();
        assert_eq!(awaited.defer(second).unwrap_err().code, -1);
        answer(&mut awaited, "bdev_repl_delete", json!({})).unwrap();
        assert!(!awaited.has("v") && awaited.due(|_| true).is_none());
        let gone = parsed("bdev_repl_promote", json!({}));
        assert!(matches!(awaited.request(gone), Turn::Other(_)));
    }
}
