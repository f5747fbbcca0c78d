#!/usr/bin/env bash
# Makes sure that there is a Vulkan device to test on: without one, Debian's software renderer is installed (as root).
# Where that is not possible a line SKIPPED says so, and the tests of the Vulkan device skip loudly.
set -euo pipefail

skip() {
    echo "SKIPPED: no Vulkan device, because $1"
    exit 0
}

case "$(uname -s)" in
Linux) ;;
Darwin)
    echo "Vulkan: Macs are tested on Metal"
    exit 0
    ;;
*) skip "this is $(uname -s)" ;;
esac

has_loader() { /sbin/ldconfig -p | grep -q 'libvulkan\.so\.1'; }
has_driver() { compgen -G '/usr/share/vulkan/icd.d/*.json' >/dev/null || compgen -G '/etc/vulkan/icd.d/*.json' >/dev/null; }

if has_loader && has_driver; then
    exit 0
fi
command -v apt-get >/dev/null || skip "this is not Debian"
[ "$(id -u)" = 0 ] || skip "only root can install mesa-vulkan-drivers and libvulkan1"
echo "Vulkan: installing the software renderer"
apt-get -qq update
DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 -qq install -y --no-install-recommends \
    mesa-vulkan-drivers libvulkan1 >/dev/null
