//! NVMe over TCP as the NVMe Base, NVMe-oF and NVMe/TCP Transport specifications have it.
