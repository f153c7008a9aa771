//! Dependencies between the network device's offered features (virtio 1.2 §5.1.3.1).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MQ,
};

use crate::virtio::FeatureNeed;

const GUEST_TSO: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
const HOST_TSO: u64 = 1 << VIRTIO_NET_F_HOST_TSO4 | 1 << VIRTIO_NET_F_HOST_TSO6;

/// The table of dependencies.
pub const NEEDS: &[FeatureNeed] = &[
    FeatureNeed { feature: 1 << VIRTIO_NET_F_GUEST_TSO4, any_of: 1 << VIRTIO_NET_F_GUEST_CSUM },
    FeatureNeed { feature: 1 << VIRTIO_NET_F_GUEST_TSO6, any_of: 1 << VIRTIO_NET_F_GUEST_CSUM },
    FeatureNeed { feature: 1 << VIRTIO_NET_F_GUEST_ECN, any_of: GUEST_TSO },
    FeatureNeed { feature: 1 << VIRTIO_NET_F_HOST_TSO4, any_of: 1 << VIRTIO_NET_F_CSUM },
    FeatureNeed { feature: 1 << VIRTIO_NET_F_HOST_TSO6, any_of: 1 << VIRTIO_NET_F_CSUM },
    FeatureNeed { feature: 1 << VIRTIO_NET_F_HOST_ECN, any_of: HOST_TSO },
    FeatureNeed { feature: 1 << VIRTIO_NET_F_MQ, any_of: 1 << VIRTIO_NET_F_CTRL_VQ },
];
