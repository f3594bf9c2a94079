#!/bin/dash
# On each node: its CNI configuration, written once, and a route to each other node's pods, for each
# family of addresses.
conflist=/etc/cni/net.d/10-network.conflist
name='{.metadata.name}'
ranges='{range .spec.podCIDRs[*]}{" "}{@}{end}'
addresses='{range .status.addresses[?(@.type=="InternalIP")]}{" "}{.address}{end}'

# The word of a list that is of the same family as an address.
same_family() { # ADDRESS WORD...
    local like=$1 word
    shift
    for word; do
        case $like,$word in
        *:*,*:* | *.*,*.*) echo "$word" && return ;;
        esac
    done
}

write_conflist() { # RANGE...
    local range subnets='' routes=''
    for range; do
        subnets="$subnets${subnets:+,}[{\"subnet\":\"$range\"}]"
        case $range in
        *:*) routes="$routes${routes:+,}{\"dst\":\"::/0\"}" ;;
        *) routes="$routes${routes:+,}{\"dst\":\"0.0.0.0/0\"}" ;;
        esac
    done
    cat >"$conflist.new" <<JSON
{
  "cniVersion": "0.3.1",
  "name": "network",
  "plugins": [
    {
      "type": "ptp",
      "ipMasq": false,
      "mtu": 1500,
      "ipam": {
        "type": "host-local",
        "dataDir": "/run/cni-ipam-state",
        "routes": [$routes],
        "ranges": [$subnets]
      }
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
JSON
    mv "$conflist.new" "$conflist"
}

while :; do
    kubectl get nodes -o "jsonpath={range .items[*]}$name|$ranges|$addresses{\"\\n\"}{end}" >/tmp/nodes
    while IFS='|' read -r node ranges_of addresses_of; do
        # shellcheck disable=SC2086 # Lists of words.
        if [ "$node" != "$THIS_NODE" ]; then
            for range in $ranges_of; do
                via=$(same_family "$range" $addresses_of)
                [ -z "$via" ] || ip route replace "$range" via "$via"
            done
        elif [ -n "$ranges_of" ] && [ ! -e "$conflist" ]; then
            write_conflist $ranges_of
        fi
    done </tmp/nodes
    sleep 2
done
