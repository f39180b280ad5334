#!/usr/bin/env bash
# The base image of the Dockerfile under its own name, made of Debian's packages, for machines that cannot reach Docker
# Hub. Needs debootstrap and root.
set -euo pipefail
engine=${CONTAINER_ENGINE:-docker}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip,python3-venv bookworm "$root"
ln -s python3 "$root/usr/bin/python"
echo 'APT::Keep-Downloaded-Packages "false"; Dir::Cache::pkgcache ""; Dir::Cache::srcpkgcache "";' \
    > "$root/etc/apt/apt.conf.d/docker-clean" # as in the official image
tar --create --directory="$root" --exclude='./dev/*' --exclude='./var/cache/apt/*' --exclude='./var/lib/apt/lists/*' . |
    "$engine" import --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
        --change 'CMD ["python3"]' - docker.io/library/python:3.11-slim-bookworm
