#!/usr/bin/env bash
# Makes the Dockerfile's two base images locally, for a machine without a container registry or a container engine.
#
#   debian:bookworm-slim   a minimal Debian from its own packages (debootstrap)
#   rust:1-bookworm        that, a C toolchain, and the Rust toolchain installed on this machine
#
# They carry the names that the Dockerfile asks for, so `buildah bud --pull=never` finds them and the Dockerfile needs no
# change. Where a registry is in reach this script isn't needed. Needs root and a Debian-like host; about four minutes, once.
#
# usage: scripts/base-images.sh
set -euo pipefail

export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
readonly DEBIAN=docker.io/library/debian:bookworm-slim
readonly RUST=docker.io/library/rust:1-bookworm

say() { printf 'base-images: %s\n' "$*" >&2; }

[ "$(id -u)" = 0 ] || { say "needs root"; exit 1; }

# Installs what is missing of the commands $@, which are also the names of their packages.
need() {
  local command missing=()
  for command in "$@"; do command -v "$command" >/dev/null || missing+=("$command"); done
  [ ${#missing[@]} = 0 ] && return
  say "installing ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

have() { buildah inspect --type image "$1" >/dev/null 2>&1; }

# The archive this machine installs from, in either of apt's two source formats; Debian's own if neither names one.
debian_mirror() {
  local found
  found=$(awk '/^URIs:/ { print $2; exit }' /etc/apt/sources.list.d/debian.sources 2>/dev/null || true)
  [ -n "$found" ] || found=$(awk '$1 == "deb" { for (i = 2; i <= NF; i++) if ($i ~ /^http/) { print $i; exit } }' /etc/apt/sources.list 2>/dev/null || true)
  echo "${found:-http://deb.debian.org/debian}"
}

make_debian() {
  local work root container
  work=$(mktemp -d)
  # shellcheck disable=SC2064  # $work is to be expanded now
  trap "rm -rf '$work'" EXIT
  root=$work/root
  say "making $DEBIAN"
  debootstrap --variant=minbase --include=ca-certificates bookworm "$root" "$(debian_mirror)" >"$work/log" 2>&1 \
    || { tail -5 "$work/log" >&2; exit 1; }
  # Builds inside the image trust what this machine trusts and reach Debian's archive the way it does.
  cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
  find /etc/apt/apt.conf.d -type f ! -name '*packagekit' ! -name '*appstream' -exec cp {} "$root/etc/apt/apt.conf.d/" \;
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
  container=$(buildah from scratch)
  buildah add -q "$container" "$root" / >/dev/null
  buildah config --cmd /bin/bash "$container"
  buildah commit -q --rm "$container" "$DEBIAN" >/dev/null
}

make_rust() {
  local container
  say "making $RUST"
  container=$(buildah from -q --pull=never "$DEBIAN")
  buildah run "$container" -- sh -c 'apt-get update -qq && apt-get install -y -qq --no-install-recommends \
      gcc g++ make pkg-config libc6-dev git >/dev/null && rm -rf /var/lib/apt/lists/*'
  buildah add -q "$container" "$(rustc --print sysroot)" /usr/local/rust >/dev/null
  buildah config --env CARGO_HOME=/usr/local/cargo \
    --env PATH=/usr/local/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
  buildah commit -q --rm "$container" "$RUST" >/dev/null
}

need buildah debootstrap
have "$DEBIAN" || make_debian
have "$RUST" || make_rust
buildah images --format '{{.Name}}:{{.Tag}}  {{.Size}}' | grep -F -e "$DEBIAN" -e "$RUST"
