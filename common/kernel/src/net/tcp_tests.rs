//! TCP connections captured, closed in silence and rebuilt, in network namespaces.
