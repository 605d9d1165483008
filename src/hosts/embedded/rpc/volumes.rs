//! Volume requests on the embedded host: handed to its volumes.

use crate::hosts::embedded::core::Core;
use crate::hosts::embedded::volume;
use crate::rpc::Reply;
use crate::rpc::volume::{VolumeRequest, VolumeService};

impl VolumeService for Core {
    fn volume_request(&mut self, request: VolumeRequest, reply: Reply) {
        volume::request(self, request, reply);
    }
}
