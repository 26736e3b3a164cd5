//! Namespaces: kinds, identity, entering, creating, and the mounts a capsule needs.
