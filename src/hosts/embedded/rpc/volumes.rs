//! Volume requests on the embedded host, until its volumes exist: there are none.

use serde_json::json;

use crate::hosts::embedded::core::Core;
use crate::rpc::volume::{VolumeRequest, VolumeService};
use crate::rpc::{Reply, RpcError, volume};

impl VolumeService for Core {
    fn volume_request(&mut self, request: VolumeRequest, reply: Reply) {
        match request {
            VolumeRequest::GetVolumes { name: None } => reply.ok(json!([])),
            VolumeRequest::GetVolumes { name: Some(name) } => reply.fail(volume::no_volume(&name)),
            _ => reply.fail(RpcError::not_supported(
                "volumes are not part of this build yet",
            )),
        }
    }

    fn volume_config(&self) -> Vec<VolumeRequest> {
        Vec::new()
    }
}
