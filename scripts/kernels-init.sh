#!/bin/busybox sh
# shellcheck shell=dash disable=SC2154
# The first process of the machines of scripts/kernels.sh. It makes a node with
# pure cgroup v2, runs what /tests names, and switches the machine off.
#
# Everything is said to the second serial line. "@NAME STATUS" ends the output
# of a step; "@done" is the last line.
#
# Environment, from the kernel's command line: expect=run|refuse, and what the
# tests read.
bb=/bin/busybox
$bb mkdir -p /applets /dev /etc /proc /run /sys /tmp /usr/sbin /usr/bin /var/tmp
$bb --install -s /applets
# The real tools first: busybox's ip, for one, knows no batches.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin:/applets

mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t tmpfs tmp /tmp
mount -t tmpfs tmp /var/tmp
mount -t tmpfs run /run
chmod 1777 /tmp /var/tmp
# As on a node: its pods' memory is limited.
echo +memory >/sys/fs/cgroup/cgroup.subtree_control
ip link set lo up
echo vm >/etc/hostname

stty -F /dev/ttyS1 raw
exec >/dev/ttyS1 2>&1

# step NAME COMMAND...
step() {
    name=$1
    shift
    "$@"
    echo "@$name $?"
}

[ "$expect" = refuse ] || sidestep check
# What is built in is not there.
while read -r module; do
    [ ! -e "/modules/$module.ko" ] || insmod "/modules/$module.ko" || echo "no module $module"
done </modules/list

step check sidestep check
if [ "$expect" = refuse ]; then
    step run sidestep run --pods /tmp
    step status sidestep status
else
    # Each line: a test binary's name and its arguments. One test at a time: forks are slow
    # here, and a child that is just being forked keeps its siblings' ports in use.
    while read -r test args; do
        # shellcheck disable=SC2086
        step "$test" "/tests.d/$test" --test-threads=1 $args
    done </tests
fi
echo "@done"
poweroff -f
